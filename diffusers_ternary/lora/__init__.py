# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA, DoRA, LoHa, LoKr) on packed layers. Nothing here imports PEFT before it is needed."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .registration import register


if TYPE_CHECKING:
    from .fold import FoldedAdapter, check_adapters, fold_adapters, folded_adapters
    from .layers import (
        TernaryLoHaConv2d,
        TernaryLoHaLinear,
        TernaryLoKrConv2d,
        TernaryLoKrLinear,
        TernaryLoraConv2d,
        TernaryLoraLinear,
    )

__all__ = [
    "FoldedAdapter",
    "TernaryLoHaConv2d",
    "TernaryLoHaLinear",
    "TernaryLoKrConv2d",
    "TernaryLoKrLinear",
    "TernaryLoraConv2d",
    "TernaryLoraLinear",
    "check_adapters",
    "fold_adapters",
    "folded_adapters",
    "register",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {name: ".layers" if name.startswith("Ternary") else ".fold" for name in __all__ if name != "register"},
)
