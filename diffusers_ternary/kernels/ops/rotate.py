# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::rotate`: the rotation of the inputs as an operator, so that each device has its own."""

import torch

from ...ternarize import rotate


@torch.library.custom_op("diffusers_ternary::rotate", mutates_args=())
def ternary_rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R`, see [`ternarize.rotate`]; always a new tensor.

    Args:
        x (`torch.Tensor`): float `[..., K]`.
        block (`int`): columns per block, a power of two of at least 2.
    """
    rotated = rotate(x, block)
    return rotated.clone() if rotated is x else rotated.contiguous()


@ternary_rotate.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return x.new_empty(x.shape)
