# SPDX-License-Identifier: Apache-2.0
"""Maths: float weights to codes and scales."""

from .int8 import Int8Weight, quantize_int8
from .low_rank import LowRank, low_rank_residual
from .rotation import hadamard_matrix, rotate
from .rounding import ROUNDINGS, Ternarized, absmean, optimum, twn
from .weight import TernaryWeight, check_finite, ternarize


__all__ = [
    "ROUNDINGS",
    "Int8Weight",
    "LowRank",
    "Ternarized",
    "TernaryWeight",
    "absmean",
    "check_finite",
    "hadamard_matrix",
    "low_rank_residual",
    "optimum",
    "quantize_int8",
    "rotate",
    "ternarize",
    "twn",
]
