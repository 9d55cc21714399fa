# SPDX-License-Identifier: Apache-2.0
"""Block-Hadamard rotation: spreads outliers over a block of columns, so that ternary codes fit better."""

import functools

import numpy as np
import torch


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R`, R block-diagonal with the Walsh-Hadamard matrix H / sqrt(block) (Sylvester order) on the diagonal.

    R is symmetric and its own inverse, so `rotate(x, b) @ rotate(w, b).T == x @ w.T`: a weight `[N, K]` whose codes
    were made after the rotation is multiplied with inputs that are rotated at run time, and no bit is stored for it.

    Args:
        x (`torch.Tensor`): float `[..., K]`.
        block (`int`): columns per block, a power of two. The K mod block last columns are left as they are; 0 = no
            rotation at all.

    Returns:
        `torch.Tensor`: `[..., K]`, dtype of `x`; the product is formed in float32 (float64 for float64).
    """
    columns = x.shape[-1]
    whole = columns - columns % block if block else 0
    if whole == 0:
        return x
    matrix = hadamard_matrix(block, torch.promote_types(x.dtype, torch.float32), x.device)
    head = x[..., :whole].to(matrix.dtype)
    head = (head.reshape(*x.shape[:-1], whole // block, block) @ matrix).reshape(*x.shape[:-1], whole).to(x.dtype)
    return head if whole == columns else torch.cat((head, x[..., whole:]), dim=-1)


def hadamard_matrix(block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard matrix `[block, block]`: entry (i, j) is (-1)^popcount(i & j) / sqrt(block)."""
    return torch.tensor(_orthonormal(block), dtype=dtype, device=device)


# An array, not a tensor: under torch.compile a tensor made here would be a fake one, and must not be remembered.
@functools.lru_cache(maxsize=16)
def _orthonormal(block: int) -> np.ndarray:
    signs = np.ones((1, 1))
    while signs.shape[0] < block:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs * block**-0.5
