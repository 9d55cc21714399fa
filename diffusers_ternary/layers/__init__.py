# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` and `nn.Conv2d` subclasses that hold packed weights."""

from .base import QuantizedLayer
from .conv import QuantizedConv2d, why_not_convertible
from .int8 import Int8Conv2d, Int8Layer, Int8Linear
from .linear import QuantizedLinear
from .ternary import TernaryConv2d, TernaryLayer, TernaryLinear


__all__ = [
    "Int8Conv2d",
    "Int8Layer",
    "Int8Linear",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "TernaryConv2d",
    "TernaryLayer",
    "TernaryLinear",
    "why_not_convertible",
]
