# SPDX-License-Identifier: Apache-2.0
"""Maths: float weights to codes and scales."""

from .int8 import Int8Weight, quantize_int8
from .low_rank import LowRank, low_rank_residual
from .recover import TernaryFit, find_group_size, recover, ternary_fit
from .rotation import hadamard_matrix, rotate
from .rounding import FUSED_ROUNDINGS, ROUNDINGS, Ternarized, absmean, optimum, twn
from .weight import TernaryWeight, check_finite, complete, round_to, ternarize


__all__ = [
    "FUSED_ROUNDINGS",
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
    "rotate",
    "round_to",
    "ternarize",
    "ternary_fit",
    "twn",
]
