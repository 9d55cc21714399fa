# SPDX-License-Identifier: Apache-2.0
"""The ternary linear layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..format import LOW_RANK_DTYPE, TernarySpec
from ..kernels import reference
from ..ops import kernel_name, ternary_linear
from ..ternarize import LowRank, TernaryWeight, rotate, ternarize
from .base import QuantizedLinear, bits_to_scale


class TernaryLinear(QuantizedLinear):
    """`nn.Linear` with a packed ternary weight: 2-bit planes in memory, base-3 in files.

    Args: see [`QuantizedLinear`]; `spec` is a [`TernarySpec`].
    """

    packed_names = ("weight", "weight_scale", "weight_multiplier", "low_rank_up", "low_rank_down")
    spec: TernarySpec
    weight_multiplier: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return kernel_name(self.weight.device.type, self.activation_dtype)

    @classmethod
    def from_weight(cls, packed: TernaryWeight, bias: torch.Tensor | None = None, **options: Any) -> "TernaryLinear":
        """Builds the layer around an already packed weight."""
        layer = cls(packed.spec, bias is not None, device="meta", **options)
        layer.install_weight(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def install_weight(self, packed: TernaryWeight) -> None:
        """Installs a packed weight, whose spec may differ from the placeholder's in all but its shape."""
        self.spec = packed.spec
        self.install(
            weight=packed.packed,
            weight_scale=packed.scale,
            weight_multiplier=packed.multiplier,
            low_rank_up=None if packed.low_rank is None else packed.low_rank.up,
            low_rank_down=None if packed.low_rank is None else packed.low_rank.down,
        )

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: Any) -> None:
        """Ternarizes a float weight `[N, K]` (`options`: see [`ternarize`]) and installs it."""
        self.install_weight(ternarize(weight, group_size=self.spec.group_size, name=name, **options))

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank correction, views of the stored bit patterns; `None` if the layer has none."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        up, down = (bits_to_scale(bits, LOW_RANK_DTYPE) for bits in (self.low_rank_up, self.low_rank_down))
        return LowRank(up, down)

    def _dequantize_packed(self) -> torch.Tensor:
        """Rotation and low-rank correction included."""
        dense = reference.dequantize(
            self.weight,
            self.scales,
            self.weight_multiplier,
            in_features=self.in_features,
            group_size=self.spec.group_size,
            dtype=torch.float32,
        )
        dense = rotate(dense, self.spec.hadamard)
        low_rank = self.low_rank
        if low_rank is not None:
            dense = dense + low_rank.dense()
        return dense

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product = self._multiply_codes(x)
        low_rank = self.low_rank
        if low_rank is None:
            return product
        return product + F.linear(F.linear(x, low_rank.down.to(x.dtype)), low_rank.up.to(x.dtype))

    def _multiply_codes(self, x: torch.Tensor) -> torch.Tensor:
        return ternary_linear(
            x,
            self.weight,
            self.scales,
            self.weight_multiplier,
            self.bias,
            self.in_features,
            self.spec.group_size,
            self.activation_dtype,
            self.spec.hadamard,
        )

    def _repr_details(self) -> str:
        spec = self.spec
        extras = (f"hadamard={spec.hadamard}, " if spec.hadamard else "") + (
            f"rank={spec.rank}, " if spec.rank else ""
        )
        return f"group_size={spec.group_size}, scales={spec.scales}, {extras}activations={self.activation_dtype}, "
