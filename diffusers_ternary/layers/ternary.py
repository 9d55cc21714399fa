# SPDX-License-Identifier: Apache-2.0
"""Layers with ternary weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..format import COLUMN_SCALE_DTYPE, LOW_RANK_DTYPE, TernarySpec
from ..kernels.compat import is_plain
from ..kernels.operands import Layout, PackedWeight
from ..kernels.ops import (
    PreparedProducts,
    check_devices,
    check_float,
    kernel_name,
    prepared_products,
    resident_weight,
    ternary_product,
    ternary_rotate,
    unpack_weight,
    unpacked_bytes,
)
from ..ternarize import LowRank, TernaryWeight, complete, ternarize
from .base import QuantizedLayer, bits_to_scale
from .conv import QuantizedConv2d
from .linear import QuantizedLinear


class TernaryLayer(QuantizedLayer):
    """What ternary layers store: 2-bit planes in memory, base-3 in files. `spec` is a [`TernarySpec`]."""

    packed_names = ("weight", "weight_scale", "weight_multiplier", "column_scale", "low_rank_up", "low_rank_down")
    spec: TernarySpec
    weight_multiplier: nn.Parameter | None
    column_scale: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    # What `multiply_rows` found last; of the class until then, so that layers of older pickles have it.
    _prepared: PreparedProducts | None = None
    _prepared_kind: tuple[Any, ...] | None = None

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return kernel_name(self.weight.device, self.activation_dtype)

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: Any) -> None:
        """Ternarizes a float weight of shape `weight_shape` (`options`: see [`ternarize`]) and installs it."""
        self.install_weight(ternarize(weight.flatten(1), group_size=self.spec.group_size, name=name, **options))

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank correction, views of the stored bit patterns; `None` if the layer has none."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        up, down = (bits_to_scale(bits, LOW_RANK_DTYPE) for bits in (self.low_rank_up, self.low_rank_down))
        return LowRank(up, down)

    @property
    def column_factors(self) -> torch.Tensor | None:
        """What each input is multiplied by, float16 `[K]`, a view of the stored bit patterns; `None` = 1."""
        return None if self.column_scale is None else bits_to_scale(self.column_scale, COLUMN_SCALE_DTYPE)

    @property
    def operand(self) -> PackedWeight:
        """The packed weight as kernels take it, column scales left out; its tensors are the layer's own."""
        spec = self.spec
        sizes = (spec.in_features, spec.group_size, spec.hadamard)
        return PackedWeight(self.weight, self.scales, self.weight_multiplier, *sizes)

    def matrix(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the dense weight matrix, `[n, K]`: formed in float32 and rounded once to `dtype`."""
        low_rank, factors, block = self.low_rank, self.column_factors, self.spec.hadamard
        weight = self.operand.each(lambda tensor: tensor[rows])
        exact = low_rank is None and factors is None and not block
        unpacked = unpack_weight(weight, dtype if exact else torch.float32)
        check_devices(unpacked.device, "the weight", column_scale=factors)
        if low_rank is not None:
            low_rank = low_rank.part(rows)
            check_devices(unpacked.device, "the weight", low_rank_up=low_rank.up, low_rank_down=low_rank.down)
        return complete(unpacked, block, factors, low_rank, dtype, rotation=ternary_rotate)

    def multiply_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` times the matrix, plus the bias: `[..., N]`."""
        if not self.spec.column_scales and not self.spec.rank:
            return self._multiply_codes(x)
        product = self._multiply_codes(self._scaled(x))
        if not self.spec.rank:
            return product
        low_rank = self.low_rank
        assert low_rank is not None
        check_devices(x.device, "the input", low_rank_up=low_rank.up, low_rank_down=low_rank.down)
        return product + F.linear(F.linear(x, low_rank.down.to(x.dtype)), low_rank.up.to(x.dtype))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What is rotated and multiplied by the codes: `x` times the column scales, rounded once to its dtype."""
        factors = self.column_factors
        if factors is None:
            return x
        check_float(x)
        check_devices(x.device, "the input", column_scale=factors)
        if x.dim() == 0 or x.shape[-1] != len(factors):
            raise ValueError(f"A ternary linear map expected [..., {len(factors)}], got {list(x.shape)}.")
        return (x * factors).to(x.dtype)  # of float16 and bfloat16 together torch makes float32

    def _multiply_codes(self, x: torch.Tensor) -> torch.Tensor:
        """The product with codes and scales, plus the bias."""
        product = None
        if is_plain(x):
            # By a prepared call, past the dispatcher. Module.__getattr__ takes longer than the checks below.
            parameters = self._parameters
            weight, scale = parameters["weight"], parameters["weight_scale"]
            multiplier, bias = parameters["weight_multiplier"], parameters["bias"]
            bias_dtype = None if bias is None else bias.dtype
            kind = (self.spec, self.scale_dtype, self.activation_dtype, multiplier is not None, bias_dtype)
            prepared = self._prepared
            if prepared is None or kind != self._prepared_kind:
                prepared = self._prepare(*kind)
            if self._resident is not None:
                product = self._resident(x, (weight, scale, multiplier), bias, self.activation_dtype)
            if (
                product is None
                and weight is not None
                and scale is not None
                and (bias is None or not (bias.requires_grad and torch.is_grad_enabled()))
            ):
                device = x.device
                call = prepared.calls.get((x.shape, x.dtype, device)) or prepared.find(x)
                if call is not None and prepared.layout.fits(device, weight, scale, multiplier, bias):
                    product = call(x, weight, scale, multiplier, bias)
        if product is None:
            product = ternary_product(x, self.operand, self.bias, self.activation_dtype)
        return product

    def keep_unpacked(self) -> int:
        """Keeps the weight unpacked to 8 bits beside the packed one, where kernels use it; see [`keep_unpacked`].

        Returns:
            `int`: its bytes, 0 where the layer's device has no 8-bit products for it.
        """
        self._resident = resident_weight(self.operand, self.activation_dtype)
        return 0 if self._resident is None else self._resident.nbytes

    def unpacked_bytes(self) -> int:
        """What [`~TernaryLayer.keep_unpacked`] takes."""
        return unpacked_bytes(self.spec.out_features, self.spec.in_features)

    def drop_unpacked(self) -> None:
        """Frees what [`~TernaryLayer.keep_unpacked`] keeps."""
        self._resident = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "TernaryLayer":
        self.drop_unpacked()  # it would stay on the device that the layer leaves
        super()._apply(fn, recurse)
        return self

    def _prepare(
        self,
        spec: TernarySpec,
        scale_dtype: torch.dtype,
        activation_dtype: str,
        has_multiplier: bool,
        bias_dtype: torch.dtype | None,
    ) -> PreparedProducts:
        layout = Layout(
            spec.out_features,
            spec.in_features,
            spec.group_size,
            scale_dtype,
            has_multiplier,
            bias_dtype,
            activation_dtype,
            spec.hadamard,
        )
        self._prepared = prepared_products(layout)
        self._prepared_kind = (spec, scale_dtype, activation_dtype, has_multiplier, bias_dtype)
        return self._prepared

    def _repr_details(self) -> str:
        spec = self.spec
        extras = "".join(
            f"{name}={getattr(spec, name)}, " for name in ("hadamard", "rank", "column_scales") if getattr(spec, name)
        )
        return f"group_size={spec.group_size}, scales={spec.scales}, {extras}activations={self.activation_dtype}, "


class TernaryLinear(QuantizedLinear, TernaryLayer):
    """`nn.Linear` with a packed ternary weight.

    Args: see [`QuantizedLinear`]; `spec` is a [`TernarySpec`].
    """

    @classmethod
    def from_weight(cls, packed: TernaryWeight, bias: torch.Tensor | None = None, **options: Any) -> "TernaryLinear":
        """Builds the layer around an already packed weight."""
        layer = cls(packed.spec, bias is not None, device="meta", **options)
        layer.install_weight(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer


class TernaryConv2d(QuantizedConv2d, TernaryLayer):
    """`nn.Conv2d` without groups and with a packed ternary weight.

    Args: see [`QuantizedConv2d`]; `spec` is a [`TernarySpec`] with `in_features` = C * kh * kw.
    """
