# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map in plain torch with bounded scratch: what serves every device without a kernel of its own.

[`reference.linear`] dequantizes the whole weight, which for a layer of 3072 x 12288 takes half a gigabyte beside the
result; here it is done some output features at a time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import reference
from .operands import PackedWeight


BLOCK_ELEMENTS = 1 << 20  # weight elements dequantized at a time: about 12 MB with everything in between

# (first, last) -> these output features of the dense weight, in the dtype of the product
Part = Callable[[int, int], torch.Tensor]


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str = "none"
) -> torch.Tensor:
    """[`reference.linear`], the same arguments and numbers; beside the result it needs `BLOCK_ELEMENTS` at a time."""

    def part(first: int, last: int) -> torch.Tensor:
        return reference.dequantize(weight.part(first, last), x.dtype)

    x = reference.operand(x, weight, activation_dtype)
    return multiply_parts(x, part, weight.out_features, bias, BLOCK_ELEMENTS)


def multiply_parts(
    x: torch.Tensor, part: Part, out_features: int, bias: torch.Tensor | None, block_elements: int
) -> torch.Tensor:
    """`x @ W.T + bias` with W made a block of output features at a time.

    Args:
        x (`torch.Tensor`): `[..., K]`.
        part (`Callable`): `part(first, last)` of W, `[last - first, K]`; may return the same memory each time.
        out_features (`int`): N.
        bias (`torch.Tensor`, *optional*): `[N]`.
        block_elements (`int`): of W at a time.
    """
    bias = None if bias is None else bias.to(x.dtype)
    step = max(16, block_elements // max(1, x.shape[-1]))
    if out_features <= step:
        return F.linear(x, part(0, out_features), bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    for first in range(0, out_features, step):
        last = min(first + step, out_features)
        y[..., first:last] = F.linear(x, part(first, last), None if bias is None else bias[first:last])
    return y
