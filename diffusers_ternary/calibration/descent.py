# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on the codes: each code in turn takes its best value, all others held."""

import dataclasses

import torch

from .gptq import BLOCK_COLUMNS, Coding, group_slices, nearest_codes


def coordinate_descent(weight: torch.Tensor, hessian: torch.Tensor, coding: Coding) -> tuple[Coding, int]:
    """One pass over all columns, vectorized over the rows; the error tr(E H Eᵀ) never grows.

    With E = W - Ŵ and the gradient g = E H, the best code of column j is the one nearest to
    `(t_j s + g_j / H_jj) / s`; then g loses `Δŵ_j H_j`. Columns with H_jj = 0 keep their codes.

    Args:
        weight (`torch.Tensor`): float `[K, N]`, the transposed weight.
        hessian (`torch.Tensor`): `[K, K]`, symmetric, not negative on the diagonal.
        coding ([`Coding`]): codes and scales to start from. Left as it is.

    Returns:
        `tuple[Coding, int]`: the improved codes with the same scales, and how many codes changed.
    """
    codes = coding.codes.clone()
    residual = weight - coding.dense()
    diagonal = hessian.diagonal().tolist()
    changed = 0
    for index, group in enumerate(group_slices(weight.shape[0], coding.group_size)):
        scale = coding.scales[index]  # [N]
        for start in range(group.start, group.stop, BLOCK_COLUMNS):
            block = slice(start, min(start + BLOCK_COLUMNS, group.stop))
            changed += _descend_block(residual, hessian, diagonal, codes, scale, block)
    return dataclasses.replace(coding, codes=codes), changed


def _descend_block(
    residual: torch.Tensor,
    hessian: torch.Tensor,
    diagonal: list[float],
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: slice,
) -> int:
    gradient = hessian[block] @ residual  # [B, N]
    inner = hessian[block, block]
    before = codes[block].clone()
    for j in range(block.stop - block.start):
        column = block.start + j
        if diagonal[column] <= 0:
            continue
        current = codes[column] * scale
        code = nearest_codes(current + gradient[j] / diagonal[column], scale)
        step = code * scale - current
        codes[column] = code
        residual[column] -= step
        gradient[j + 1 :].addr_(inner[j + 1 :, j], step, alpha=-1)
    return int((codes[block] != before).sum())
