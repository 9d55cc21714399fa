# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA, DoRA, LoHa, LoKr) on packed layers. Nothing here imports PEFT before it is needed."""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register


if TYPE_CHECKING:
    from .layers import (
        TernaryLoHaConv2d,
        TernaryLoHaLinear,
        TernaryLoKrConv2d,
        TernaryLoKrLinear,
        TernaryLoraConv2d,
        TernaryLoraLinear,
    )

__all__ = [
    "TernaryLoHaConv2d",
    "TernaryLoHaLinear",
    "TernaryLoKrConv2d",
    "TernaryLoKrLinear",
    "TernaryLoraConv2d",
    "TernaryLoraLinear",
    "register",
]

_LAZY = {
    "TernaryLoHaConv2d": ".layers",
    "TernaryLoHaLinear": ".layers",
    "TernaryLoKrConv2d": ".layers",
    "TernaryLoKrLinear": ".layers",
    "TernaryLoraConv2d": ".layers",
    "TernaryLoraLinear": ".layers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
