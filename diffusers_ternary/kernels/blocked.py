# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map in plain torch with bounded scratch: what serves every device without a kernel of its own.

[`reference.linear`] dequantizes the whole weight, which for a layer of 3072 x 12288 takes half a gigabyte beside the
result; here it is done some rows at a time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..ternarize import rotate
from . import reference


BLOCK_ELEMENTS = 1 << 20  # weight elements dequantized at a time: about 12 MB with everything in between

# (first row, last row) -> those rows of the dense weight, in the dtype of the product
Rows = Callable[[int, int], torch.Tensor]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str = "none",
    hadamard: int = 0,
) -> torch.Tensor:
    """[`reference.linear`], the same arguments and numbers; beside the result it needs `BLOCK_ELEMENTS` at a time."""

    def rows(first: int, last: int) -> torch.Tensor:
        part = None if multiplier is None else multiplier[first:last]
        return reference.dequantize(
            weight[first:last], scale[first:last], part, in_features=in_features, group_size=group_size, dtype=x.dtype
        )

    x = rotate(x, hadamard)
    if activation_dtype in ("int8", "float8_e4m3fn"):
        x = reference.fake_quantize_activations(x, activation_dtype)
    return multiply_rows(x, rows, weight.shape[0], bias, BLOCK_ELEMENTS)


def multiply_rows(
    x: torch.Tensor, rows: Rows, out_features: int, bias: torch.Tensor | None, block_elements: int
) -> torch.Tensor:
    """`x @ W.T + bias` with W made a block of rows at a time.

    Args:
        x (`torch.Tensor`): `[..., K]`.
        rows (`Callable`): `rows(first, last)` of W, `[last - first, K]`; may return the same memory each time.
        out_features (`int`): N.
        bias (`torch.Tensor`, *optional*): `[N]`.
        block_elements (`int`): of W at a time.
    """
    bias = None if bias is None else bias.to(x.dtype)
    step = max(16, block_elements // max(1, x.shape[-1]))
    if out_features <= step:
        return F.linear(x, rows(0, out_features), bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    for first in range(0, out_features, step):
        last = min(first + step, out_features)
        y[..., first:last] = F.linear(x, rows(first, last), None if bias is None else bias[first:last])
    return y
