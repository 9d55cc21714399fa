# SPDX-License-Identifier: Apache-2.0
"""The best scales for given codes, all groups of a row at once."""

import dataclasses

import torch

from ..kernels.cpu import coding as compiled
from .gptq import Coding, group_slices


# Relative to the diagonal: keeps the solve regular where two groups of a row are collinear under H.
_RIDGE = 1e-7
# Bounds the temporary T_aᵀ H of a slice of rows.
_CHUNK_ELEMENTS = 1 << 24
# On CPUs it is to stay in the cache.
_COMPILED_ROWS = 256


def refit_scales(target: torch.Tensor, hessian: torch.Tensor, coding: Coding) -> Coding:
    """Minimizes tr(E H Eᵀ) over the scales.

    Per row `A s = b` with `A_ab = t_aᵀ H_ab t_b` and `b_a = t_aᵀ (H w)_a`, a batched solve of G × G systems. A group
    whose best scale is negative gets the opposite codes and the positive scale, which is the same weight.

    Args:
        target (`torch.Tensor`): float `[K, N]`, H Wᵀ.
        hessian (`torch.Tensor`): `[K, K]`.
        coding ([`Coding`]): its codes count. Left as it is.

    Returns:
        [`Coding`]: groups without a nonzero code have scale 0.
    """
    codes, group_size = coding.codes, coding.group_size
    columns, rows = codes.shape
    step = _COMPILED_ROWS if compiled.serves(hessian) else max(1, _CHUNK_ELEMENTS // columns)
    parts = [
        _refit_rows(target[:, start : start + step], hessian, codes[:, start : start + step], group_size)
        for start in range(0, rows, step)
    ]
    scales = torch.cat(parts, dim=1)  # [G, N]
    if not bool((scales < 0).any()):
        return dataclasses.replace(coding, scales=scales)
    signs = torch.where(scales < 0, -1, 1).to(torch.int8)
    signs = signs.repeat_interleave(group_size, dim=0)[:columns]
    return dataclasses.replace(coding, codes=codes * signs, scales=scales.abs())


def _refit_rows(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    rows = codes.shape[1]
    groups = group_slices(codes.shape[0], group_size)
    values = codes.to(hessian.dtype)
    system = torch.zeros(rows, len(groups), len(groups), dtype=torch.float64, device=codes.device)
    for a, group in enumerate(groups):
        product = hessian[group.start :, group] @ values[group]  # [K - start, n]; the rest follows by symmetry
        system[:, a, a:] = _sum_groups(product, codes[group.start :], group_size).T
    upper = system.triu(1)
    system = system + upper.mT
    wanted = _sum_groups(target, codes, group_size).T.double()  # [n, G]
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    diagonal += torch.where(empty, torch.ones_like(diagonal), _RIDGE * diagonal)
    wanted = torch.where(empty, torch.zeros_like(wanted), wanted)
    return _solve(system, wanted).T.to(hessian.dtype)


def _solve(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(wanted.unsqueeze(-1), factor).squeeze(-1)
    singular = (info != 0) | ~torch.isfinite(solution).all(dim=1)
    if bool(singular.any()):
        inverse = torch.linalg.pinv(system[singular], hermitian=True)
        solution[singular] = (inverse @ wanted[singular].unsqueeze(-1)).squeeze(-1)
    return solution


def _sum_groups(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums product · codes, both `[K, n]`, over the columns of each group: `[G, n]`."""
    if compiled.serves(product):
        return compiled.group_sums(product, codes, group_size)
    values = product * codes
    missing = -len(values) % group_size
    if missing:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return values.view(-1, group_size, values.shape[1]).sum(dim=1)
