# SPDX-License-Identifier: Apache-2.0
"""What adapter layers do differently when their base layer is packed."""

import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backend.dequantize import dequantize_layers
from ..layers import QuantizedLayer
from .compat import check_adapters_to_merge


logger = logging.getLogger(__name__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

if TYPE_CHECKING:
    # At run time the mixin stands before one of PEFT's layers.
    from .compat import BaseTunerLayer as _TunerLayer
else:
    _TunerLayer = object


def adapter_dtype(packed: QuantizedLayer) -> torch.dtype | None:
    """Dtype of adapters and float copies of a packed layer; `None` where the layer does not say."""
    # Layerwise casting stores float8, in which nothing is computed.
    return packed.float_dtype if packed.float_dtype in _FLOATS else None


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy with float layers for packed ones, whose codes cannot be trained: for PEFT's `modules_to_save`."""
    if isinstance(module, QuantizedLayer):
        return module.to_float(adapter_dtype(module))
    copied = copy.deepcopy(module)
    dequantize_layers(copied)
    return copied


class PackedBaseMixin(_TunerLayer):
    """Goes before a PEFT layer for `nn.Linear` or `nn.Conv2d` and makes it work on the packed layer.

    Merging ("fusing") forms the dense weight of base and adapters and hands it to the base layer, which multiplies by
    it from then on; the packed weight is not touched, so that unmerging is exact to the last bit. A weight is never
    ternarized again behind the user's back. Where the base had a dense weight already, of adapters that were merged
    and then unloaded, unmerging restores that.

    The base may stop being packed (`model.dequantize()`): everything is then left to PEFT.
    """

    _stand_in: tuple[nn.Module, ...] = ()  # a tuple, or nn.Module would register it
    # The dense weight and bias below the merged adapters, in CPU memory: no part of the model, seldom needed.
    _beneath: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def get_base_layer(self) -> nn.Module:
        """The layer under all adapters; while something needs it as a float layer, a float layer."""
        return self._stand_in[0] if self._stand_in else super().get_base_layer()

    @property
    def packed_base(self) -> QuantizedLayer | None:
        """The base layer if it is packed."""
        base = super().get_base_layer()
        return base if isinstance(base, QuantizedLayer) else None

    @contextmanager
    def float_base(self, *, values: bool) -> Iterator[None]:
        """Shows PEFT a float layer of the base's shape: with its `values`, or on the meta device."""
        packed = self.packed_base
        if packed is None:
            yield
            return
        dtype = adapter_dtype(packed)
        self._stand_in = (packed.to_float(dtype) if values else _empty_float(packed, dtype),)
        try:
            yield
        finally:
            self._stand_in = ()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        """Where new adapters go, and their dtype: that of the model, which the packed weight does not show."""
        packed = self.packed_base
        if packed is None:
            return super()._get_base_layer_device_and_dtype(base_layer)
        return packed.weight.device, adapter_dtype(packed)

    # --- merging --------------------------------------------------------------------------------------------------

    def _merged_parameters(
        self, packed: QuantizedLayer, adapter_name: str, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight now, in `dtype`, with the adapter merged into it, and the bias if that changes."""
        weight = self._merged_weight(adapter_name, packed.dequantize(dtype))
        return weight, self._merged_bias(adapter_name, packed.active_bias)

    def _merged_weight(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, of the float layer's shape, with the adapter merged into it."""
        return weight + self.get_delta_weight(adapter_name).to(weight.dtype)  # type: ignore[attr-defined]

    def _merged_bias(self, adapter_name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias that goes with it; `None` if the adapter has none."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into a dense weight beside the packed one.

        Args:
            safe_merge (`bool`): whether to check for NaN and Inf first.
            adapter_names (`list[str]`, *optional*): default: the active ones.

        Raises:
            ValueError: if the weights are not in memory, or `safe_merge` finds NaN or Inf.
        """
        packed = self.packed_base
        if packed is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        if not self.merged:
            beneath = (packed.fused_weight, packed.fused_bias)
            self._beneath = tuple(None if t is None else t.detach().cpu() for t in beneath)  # type: ignore[assignment]
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self._get_available_adapters():
                with torch.no_grad():
                    self._merge_one(packed, name, safe_merge)
                self.merged_adapters.append(name)

    def _check_in_memory(self, what: str) -> None:
        if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
            raise ValueError(
                f"Cannot {what}: its weights are not in memory (sequential CPU offload keeps them elsewhere). Call "
                "pipe.remove_all_hooks(), fuse or unfuse, and enable the offload again; or do not fuse."
            )

    def _merge_one(self, packed: QuantizedLayer, name: str, safe_merge: bool) -> None:
        self._check_in_memory(f"fuse the adapter {name!r}")
        dtype = adapter_dtype(packed) or torch.float32
        # float32: the sum is rounded once, to the dtype it is stored in.
        exact = torch.promote_types(dtype, torch.float32)
        weight, bias = self._merged_parameters(packed, name, exact)
        if safe_merge and not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
            raise ValueError(f"NaN or Inf in the merged weight: the adapter {name!r} seems to be broken.")
        packed.fuse(weight.to(dtype), bias)
        _log_memory_once(dtype)

    def unmerge(self) -> None:
        """Drops the dense weight of the merged adapters: what they were merged into, never touched, counts again."""
        packed = self.packed_base
        if packed is None:
            super().unmerge()
        elif not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self._restore(packed)
            self.merged_adapters.clear()

    def _restore(self, packed: QuantizedLayer) -> None:
        weight, bias = self._beneath
        now = packed.fused_weight
        if weight is not None:
            self._check_in_memory(f"unfuse the adapters {', '.join(self.merged_adapters)}")
        packed.unfuse()
        if weight is not None and now is not None:
            packed.fuse(weight.to(now), None if bias is None else bias.to(now.device))  # cast since, if the model was
        self._beneath = (None, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. One that is merged stays in the weight, as in a float layer."""
        if self.packed_base is not None and adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            self.merge(adapter_names=[adapter_name])
            self.merged_adapters.clear()
            super().delete_adapter(adapter_name)
            if others:
                self.merge(adapter_names=others)
        else:
            super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT's `unload()` and `merge_and_unload()` leave in the place of this layer.

        After a merge that is a float layer: nobody can unmerge any more, so the packed weight has no use.
        """
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        packed = self.packed_base
        if packed is not None and packed.is_fused and merge:
            # Tuners other than LoRA hand the base layer's tensors to what takes its place.
            self.base_layer = packed.to_float(adapter_dtype(packed))
        return self.get_base_layer()


def _empty_float(packed: QuantizedLayer, dtype: torch.dtype | None) -> nn.Module:
    """The float module that the packed one stands for, without values."""
    bias = None if packed.bias is None else torch.empty(packed.bias.shape, device="meta", dtype=dtype)
    return packed.float_module(torch.empty(packed.weight_shape, device="meta", dtype=dtype), bias)


@functools.cache
def _log_memory_once(dtype: torch.dtype) -> None:
    logger.warning(
        "Fused adapters: every layer they change holds a dense %s weight (%d bits per weight) beside its packed one, "
        "and is as fast as a dense layer. unfuse_lora() drops it and restores the packed layer bit by bit.",
        str(dtype).removeprefix("torch."),
        8 * dtype.itemsize,
    )
