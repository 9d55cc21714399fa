# SPDX-License-Identifier: Apache-2.0
"""What a ternary product depends on besides the activations: one type for the kernels of every device."""

from collections.abc import Callable

import torch

from .triton.weights import Layout, PackedWeight


__all__ = ["Call", "Layout", "PackedWeight"]

# (input, weight, scale, multiplier, bias) -> output; the scale in its float dtype or as its bit pattern.
Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    torch.Tensor,
]
