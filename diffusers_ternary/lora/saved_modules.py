# SPDX-License-Identifier: Apache-2.0
"""PEFT's `modules_to_save` on packed models: what is trained as a whole is a float copy."""

import copy

from torch import nn

from ..backend.dequantize import dequantize_layers
from ..layers import QuantizedLayer
from .packed_base import PackedBaseMixin


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy of a module, in which float layers stand for packed ones; they can be trained, codes cannot."""
    if isinstance(module, QuantizedLayer):
        return module.to_float(PackedBaseMixin._base_dtype(module))
    copied = copy.deepcopy(module)
    dequantize_layers(copied)
    return copied
