# SPDX-License-Identifier: Apache-2.0
"""Maths: float weights to codes and scales."""

from .int8 import Int8Weight, quantize_int8
from .rounding import ROUNDINGS, Ternarized, absmean, optimum, twn
from .weight import TernaryWeight, check_finite, ternarize


__all__ = [
    "ROUNDINGS",
    "Int8Weight",
    "Ternarized",
    "TernaryWeight",
    "absmean",
    "check_finite",
    "optimum",
    "quantize_int8",
    "ternarize",
    "twn",
]
