# SPDX-License-Identifier: Apache-2.0
"""Maths: float weights to codes and scales."""

from .int8 import Int8Weight, quantize_int8
from .low_rank import LowRank, low_rank_residual
from .recover import TernaryFit, find_group_size, recover, ternary_fit
from .rotation import hadamard_matrix, rotate
from .rounding import ROUNDINGS, Ternarized, absmean, optimum, register_fused_rounding, twn
from .weight import TernaryWeight, check_finite, complete, ternarize


__all__ = [
    "ROUNDINGS",
    "Int8Weight",
    "LowRank",
    "Ternarized",
    "TernaryFit",
    "TernaryWeight",
    "absmean",
    "check_finite",
    "complete",
    "find_group_size",
    "hadamard_matrix",
    "low_rank_residual",
    "optimum",
    "quantize_int8",
    "recover",
    "register_fused_rounding",
    "rotate",
    "ternarize",
    "ternary_fit",
    "twn",
]
