# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of one weight matrix for a given quadratic form of the error."""

import dataclasses

import torch

from ..format import TernarySpec, double_quantize, group_scales, pack_planes, storage_dtype
from ..ternarize import TernaryWeight, ternarize
from .config import SolverConfig
from .descent import coordinate_descent, expand
from .gptq import Coding, gptq
from .hessian import DampedHessian
from .refit import refit_scales


# A row of many groups averages the choice between starts away: the error falls by 10 % with 1 group a row, 3 % with
# 4, 2 % with 8 and 1 % with 32 (random weights, correlated inputs), which is not worth a multiple of the time.
MAX_GROUPS_FOR_STARTS = 8


@dataclasses.dataclass(frozen=True)
class SolvedCodes:
    """What [`solve_codes`] found.

    Args:
        weight ([`TernaryWeight`]): packed.
        dense (`torch.Tensor`): what it stands for, float `[K, N]`.
        first (`torch.Tensor`): what GPTQ (or rounding, where GPTQ is off) had found, float `[K, N]`.
        coding ([`Coding`]): codes and scales before the scales were rounded to their storage.
    """

    weight: TernaryWeight
    dense: torch.Tensor
    first: torch.Tensor
    coding: Coding


def solve_codes(
    target: torch.Tensor,
    damped: DampedHessian,
    spec: TernarySpec,
    config: SolverConfig,
    *,
    start: Coding | None = None,
) -> SolvedCodes:
    """Chooses codes and scales with a small tr(E H Eᵀ), E = W - Ŵ.

    GPTQ, then coordinate descent and the joint refit of the scales in turn, then the scales are rounded to their
    storage and the codes descend once more against the rounded scales, so that what is packed is what was optimised.

    Args:
        target (`torch.Tensor`): float `[K, N]`, the transposed weight.
        damped ([`DampedHessian`]): H.
        spec ([`TernarySpec`]): group size and scale layout.
        config ([`SolverConfig`]): which stages run.
        start ([`Coding`], *optional*): go on from these codes instead of GPTQ's.
    """
    size = spec.group_size
    projected = damped.matrix @ target  # H Wᵀ, [K, N]
    if start is None:
        first = _initial(target, damped, spec, config)
        coding = _search(target, damped, projected, first, size, config)
    else:
        first = start
        coding = _improve(target, damped.matrix, projected, start, size, config)
    weight, stored = _store(target, damped.matrix, coding, spec, config)
    return SolvedCodes(weight, expand(stored, size), expand(first, size), coding)


def _initial(target: torch.Tensor, damped: DampedHessian, spec: TernarySpec, config: SolverConfig) -> Coding:
    if config.gptq:
        return gptq(target, damped.upper, group_size=spec.group_size, rounding=config.rounding)
    rounded = ternarize(target.T, group_size=spec.group_size, rounding=config.rounding, scales="group")
    return Coding(rounded.codes().T.contiguous(), rounded.scale.to(target).T.contiguous())


def _search(
    target: torch.Tensor,
    damped: DampedHessian,
    projected: torch.Tensor,
    start: Coding,
    group_size: int,
    config: SolverConfig,
) -> Coding:
    """Follows every start for one pass, keeps the best for each row, and follows that to the end."""
    stretches = config.stretches if config.gptq else ()
    if not stretches or len(start.scales) > MAX_GROUPS_FOR_STARTS:
        return _improve(target, damped.matrix, projected, start, group_size, config)
    first = dataclasses.replace(config, descent_passes=min(config.descent_passes, 1))
    best = _improve(target, damped.matrix, projected, start, group_size, first)
    errors = row_errors(target - expand(best, group_size), damped.matrix)
    for stretch in stretches:
        other = gptq(target, damped.upper, group_size=group_size, rounding=config.rounding, stretch=stretch)
        other = _improve(target, damped.matrix, projected, other, group_size, first)
        found = row_errors(target - expand(other, group_size), damped.matrix)
        better = found < errors  # [N]
        best = Coding(torch.where(better, other.codes, best.codes), torch.where(better, other.scales, best.scales))
        errors = torch.where(better, found, errors)
    return _improve(target, damped.matrix, projected, best, group_size, config)


def _improve(
    target: torch.Tensor,
    hessian: torch.Tensor,
    projected: torch.Tensor,
    coding: Coding,
    group_size: int,
    config: SolverConfig,
) -> Coding:
    for turn in range(config.descent_passes + 1):
        if turn:
            coding, changed = coordinate_descent(target, hessian, coding, group_size=group_size)
            if not changed:
                break
        if config.refit:
            coding = refit_scales(projected, hessian, coding.codes, group_size=group_size)
    return coding


def _store(
    target: torch.Tensor, hessian: torch.Tensor, coding: Coding, spec: TernarySpec, config: SolverConfig
) -> tuple[TernaryWeight, Coding]:
    exact = coding.scales.T.float()  # [N, G]
    multiplier = None
    if spec.scales == "double":
        scale, multiplier = double_quantize(exact)
    else:
        scale = exact.to(storage_dtype(exact))
    stored = Coding(coding.codes, group_scales(scale, multiplier).to(target).T.contiguous())
    if config.descent_passes:
        stored, _ = coordinate_descent(target, hessian, stored, group_size=spec.group_size)
    return TernaryWeight(spec, pack_planes(stored.codes.T.contiguous()), scale, multiplier), stored


def row_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The quadratic form of each row's error: `[N]` from E `[K, N]`."""
    return ((hessian @ error) * error).sum(dim=0)
