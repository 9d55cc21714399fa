# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on the codes: each code in turn takes its best value, all others held."""

import dataclasses

import torch

from ..kernels.cpu import coding as compiled
from .gptq import BLOCK_COLUMNS, PANEL_COLUMNS, Coding, group_slices, nearest_codes


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
    codes = coding.codes.clone(memory_format=torch.contiguous_format)
    residual = (weight - coding.dense()).contiguous()
    coding = dataclasses.replace(coding, codes=codes)
    descend = _descend_compiled if compiled.serves(residual) and compiled.serves(hessian) else _descend
    return coding, descend(residual, hessian, coding)


def _descend_compiled(residual: torch.Tensor, hessian: torch.Tensor, coding: Coding) -> int:
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    changed = 0
    for start in range(0, len(residual), PANEL_COLUMNS):
        panel = slice(start, start + PANEL_COLUMNS)
        changed += compiled.code_columns(
            hessian[panel] @ residual,
            hessian[panel, panel],
            coding.scales[start // coding.group_size :],
            coding.codes[panel],
            group_size=coding.group_size,
            first=start % coding.group_size,
            inverse=inverse[panel],
            residual=residual[panel],
        )
    return changed


def _descend(residual: torch.Tensor, hessian: torch.Tensor, coding: Coding) -> int:
    diagonal = hessian.diagonal().tolist()
    changed = 0
    for index, group in enumerate(group_slices(len(residual), coding.group_size)):
        scale = coding.scales[index]  # [N]
        for start in range(group.start, group.stop, BLOCK_COLUMNS):
            block = slice(start, min(start + BLOCK_COLUMNS, group.stop))
            changed += _descend_block(residual, hessian, diagonal, coding.codes, scale, block)
    return changed


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
