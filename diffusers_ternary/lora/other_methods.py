# SPDX-License-Identifier: Apache-2.0
"""Adapter methods of PEFT that are not made for packed layers: what they may do there, and what is refused."""

import types
from typing import Any

from torch import nn

from ..compat_peft import BaseTunerLayer
from ..layers import QuantizedLayer
from .packed_base import PackedBaseMixin


# Their forward calls the base layer and looks at nothing inside it (integration_tests/unit/test_lora_layer.py).
_METHODS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "VERA", "MISS")


def check_method(config: Any, target: nn.Module) -> None:
    """Checks that an adapter method works on the layer that is to get it.

    Raises:
        ValueError: for a packed layer and a method that reads its weight, which holds codes.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    method = config.peft_type.value
    if isinstance(base, QuantizedLayer) and method not in _METHODS:
        raise ValueError(
            f"{method} reads or changes the base weight, of which a packed {type(base).__name__} holds codes. "
            f"Methods for packed layers: {', '.join(_METHODS)}. For others call dequantize() on the model first."
        )


def refuse_merging(module: nn.Module) -> None:
    """Makes `merge` of an adapter layer raise while its base is packed, unless the layer is made for that."""
    if not isinstance(module, BaseTunerLayer) or isinstance(module, PackedBaseMixin):
        return
    if isinstance(module.get_base_layer(), QuantizedLayer):
        module.merge = types.MethodType(_merge_if_float, module)  # type: ignore[method-assign]


def _merge_if_float(self: Any, *args: Any, **kwargs: Any) -> None:
    base = self.get_base_layer()
    if isinstance(base, QuantizedLayer):
        raise ValueError(
            f"Merging {type(self).__module__.split('.')[-2].upper()} would change the packed weight of a "
            f"{type(base).__name__} as if it were floats. Use the adapter unmerged, or call dequantize() on the model "
            "first."
        )
    type(self).merge(self, *args, **kwargs)
