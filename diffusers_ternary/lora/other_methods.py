# SPDX-License-Identifier: Apache-2.0
"""Adapter methods of PEFT beside LoRA, LoHa and LoKr on packed layers, and what is refused there.

Their layers are PEFT's own for floats. They are made while the base shows a float weight of its shape and dtype, and
merge into a float copy of the base, which becomes its dense weight; see [`PackedBaseMixin`].
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..backend.method import QUANT_METHOD
from ..layers import QuantizedConv2d, QuantizedLayer
from .compat import (
    BaseTunerLayer,
    BOFTConv2d,
    BOFTLinear,
    IA3Conv2d,
    IA3Linear,
    MissLinear,
    OFTConv2d,
    OFTLinear,
    QuantizationBackend,
    ShiraLinear,
    VeraLinear,
)
from .packed_base import PackedBaseMixin, adapter_dtype


_OWN_LAYERS = ("LORA", "LOHA", "LOKR")
_METHODS = (*_OWN_LAYERS, "IA3", "OFT", "BOFT", "VERA", "MISS", "SHIRA")


class PackedBackend(QuantizationBackend):
    """How PEFT reads and replaces the weight of a packed layer.

    Args:
        layer_type (`str`): `"linear"` or `"conv2d"`.
        supports_merge (`bool`, *optional*, defaults to `True`): false makes SHiRA's forward add its sparse product to
            the packed one, instead of dequantizing the weight.
    """

    backend_name = QUANT_METHOD

    def __init__(self, layer_type: Any, supports_merge: bool = True) -> None:
        self.layer_type = layer_type
        self.supports_merge = supports_merge

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The dense weight, in the dtype of the float layer."""
        assert isinstance(base_layer, QuantizedLayer)
        return base_layer.dequantize(adapter_dtype(base_layer))

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        """Puts a dense weight in front of the packed one."""
        peft_layer.get_base_layer().fuse(weight_data)


_LINEAR, _CONV, _SPARSE = PackedBackend("linear"), PackedBackend("conv2d"), PackedBackend("linear", False)


class _OtherMixin(PackedBaseMixin):
    """Makes a float layer of PEFT merge into a float copy of its packed base."""

    _backend = _LINEAR

    @property
    def quantization_backend(self) -> QuantizationBackend | None:  # type: ignore[override] # PEFT sets it when made
        """PEFT's way to the weight; none while the base is shown as a float layer, or is one."""
        return None if self._stand_in or self.packed_base is None else self._backend

    def _merged_parameters(
        self, packed: QuantizedLayer, adapter_name: str, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if packed.active_bias is None else packed.active_bias.detach().to(dtype, copy=True)
        merged: Any = packed.float_module(packed.dequantize(dtype).clone(), bias)
        before = None if bias is None else bias.clone()
        self._stand_in = (merged,)
        try:
            super(PackedBaseMixin, self).merge(adapter_names=[adapter_name])
        finally:
            self._stand_in = ()
        self.merged_adapters.remove(adapter_name)  # the caller adds it when all is well
        changed = before is not None and not torch.equal(before, merged.bias)
        return merged.weight, merged.bias if changed else None


class PackedIA3Linear(_OtherMixin, IA3Linear):
    """(IA)³ on a packed linear layer."""


class PackedIA3Conv2d(_OtherMixin, IA3Conv2d):
    """(IA)³ on a packed convolution."""

    _backend = _CONV

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The packed convolution of scaled inputs, or its scaled output."""
        with self.float_base(values=False):  # PEFT casts the inputs to the dtype of the base weight
            return super().forward(x, *args, **kwargs)


class PackedOFTLinear(_OtherMixin, OFTLinear):
    """OFT on a packed linear layer."""


class PackedOFTConv2d(_OtherMixin, OFTConv2d):
    """OFT on a packed convolution."""

    _backend = _CONV

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into a dense weight beside the packed one.

        Raises:
            ValueError: for kernels of more than one pixel, which PEFT turns otherwise in `merge` than in `forward`.
        """
        packed = self.packed_base
        if isinstance(packed, QuantizedConv2d) and packed.kernel_size != (1, 1):
            raise ValueError(
                "PEFT merges OFT into k x k convolutions as another map than it computes unmerged, on float layers "
                "too. Use the adapter unmerged."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class PackedBOFTLinear(_OtherMixin, BOFTLinear):
    """BOFT on a packed linear layer."""


class PackedBOFTConv2d(_OtherMixin, BOFTConv2d):
    """BOFT on a packed convolution, whose weight is dequantized in each forward."""

    _backend = _CONV


class PackedVeraLinear(_OtherMixin, VeraLinear):
    """VeRA on a packed linear layer."""


class PackedMissLinear(_OtherMixin, MissLinear):
    """MiSS on a packed linear layer; with `init_weights="bat"`, its weight is dequantized in each forward."""


class PackedShiraLinear(_OtherMixin, ShiraLinear):
    """SHiRA on a packed linear layer."""

    _backend = _SPARSE


_PACKED = {
    IA3Linear: PackedIA3Linear,
    IA3Conv2d: PackedIA3Conv2d,
    OFTLinear: PackedOFTLinear,
    OFTConv2d: PackedOFTConv2d,
    BOFTLinear: PackedBOFTLinear,
    BOFTConv2d: PackedBOFTConv2d,
    VeraLinear: PackedVeraLinear,
    MissLinear: PackedMissLinear,
    ShiraLinear: PackedShiraLinear,
}


@contextmanager
def shown_as_float(config: Any, target: nn.Module) -> Iterator[None]:
    """Checks that an adapter method works on the layer that is to get it, and shows PEFT the layer's float weight.

    The weight has the shape, dtype and device of the float layer's. It has values only for SHiRA, whose masks may
    depend on them, and takes no memory otherwise.

    Raises:
        ValueError: for a packed layer and a method that reads its weight, which holds codes.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    method = config.peft_type.value
    if not isinstance(base, QuantizedLayer) or method in _OWN_LAYERS:
        yield
        return
    if method not in _METHODS:
        raise ValueError(
            f"{method} reads or changes the base weight, of which a packed {type(base).__name__} holds codes. "
            f"Methods for packed layers: {', '.join(_METHODS)}. For others call dequantize() on the model first."
        )
    codes, compute_dtype = base.weight, base.compute_dtype
    dtype = adapter_dtype(base)
    if method == "SHIRA" and not codes.is_meta:
        weight = base.dequantize(dtype)
    else:
        weight = torch.empty((), device=codes.device, dtype=dtype).expand(base.weight_shape)
    base.weight = nn.Parameter(weight, requires_grad=False)
    base.compute_dtype = weight.dtype  # where PEFT looks first for the dtype of new adapters
    try:
        yield
    finally:
        base.weight, base.compute_dtype = codes, compute_dtype


def adopt(module: nn.Module) -> None:
    """Makes an adapter layer that PEFT made for floats work on its packed base, or at least refuse to merge."""
    if not isinstance(module, BaseTunerLayer) or isinstance(module, PackedBaseMixin):
        return
    if not isinstance(module.get_base_layer(), QuantizedLayer):
        return
    if type(module) in _PACKED:
        module.__class__ = _PACKED[type(module)]  # type: ignore[assignment] # the same layer with more methods
    else:
        module.merge = types.MethodType(_merge_if_float, module)  # type: ignore[method-assign]


def _merge_if_float(self: Any, *args: Any, **kwargs: Any) -> None:
    base = self.get_base_layer()
    if isinstance(base, QuantizedLayer):
        raise ValueError(
            f"Merging {type(self).__name__} would change the packed weight of a "
            f"{type(base).__name__} as if it were floats. Use the adapter unmerged, or call dequantize() on the model "
            "first."
        )
    type(self).merge(self, *args, **kwargs)
