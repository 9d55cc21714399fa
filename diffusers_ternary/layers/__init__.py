# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` subclasses that hold packed weights."""

from .base import QuantizedLinear
from .int8 import Int8Linear
from .ternary import TernaryLinear


__all__ = ["Int8Linear", "QuantizedLinear", "TernaryLinear"]
