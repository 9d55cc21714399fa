# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of one weight matrix for a given quadratic form of the error."""

import dataclasses

import torch

from ..format import TernarySpec, group_scales, pack_planes
from ..ternarize import TernaryWeight, ternarize
from .config import SolverConfig
from .descent import coordinate_descent
from .gptq import Coding, gptq
from .hessian import DampedHessian
from .polish import polish
from .refit import refit_scales


# A row of many groups averages the choice between starts away: the error falls by 10 % with 1 group a row, 3 % with
# 4, 2 % with 8 and 1 % with 32 (random weights, correlated inputs), which is not worth a multiple of the time.
MAX_GROUPS_FOR_STARTS = 8


class CodeSearch:
    """Chooses codes and scales of a matrix with a small tr(E H Eᵀ), E = W - Ŵ.

    GPTQ gives a [`start`], which coordinate descent and the joint refit of the scales [`improve`] in turn; [`pack`]
    rounds the scales to their storage, and the codes descend once more against the rounded scales, so that what is
    packed is what was optimized.

    Args:
        target (`torch.Tensor`): float `[K, N]`, the transposed weight.
        damped ([`DampedHessian`]): H.
        spec ([`TernarySpec`]): group size and scale layout.
        config ([`SolverConfig`]): which stages run.
    """

    def __init__(self, target: torch.Tensor, damped: DampedHessian, spec: TernarySpec, config: SolverConfig) -> None:
        self._target = target
        self._damped = damped
        self._spec = spec
        self._config = config
        self._projected = damped.matrix @ target  # H Wᵀ, [K, N]

    def start(self, stretch: float = 1.0) -> Coding:
        """What GPTQ finds, its group scales stretched by a factor; plain rounding where GPTQ is off."""
        size, rounding = self._spec.group_size, self._config.rounding
        if self._config.gptq:
            return gptq(self._target, self._damped.upper, group_size=size, rounding=rounding, stretch=stretch)
        rounded = ternarize(self._target.T, group_size=size, rounding=rounding, scales="group")
        return Coding(rounded.codes().T.contiguous(), rounded.scale.to(self._target).T.contiguous(), size)

    def search(self, start: Coding) -> Coding:
        """Follows every start for one pass, keeps the best for each row, and follows that to the end."""
        passes = self._config.descent_passes
        stretches = self._config.stretches if self._config.gptq else ()
        if not stretches or len(start.scales) > MAX_GROUPS_FOR_STARTS:
            return self.improve(start)
        best = self.improve(start, passes=min(passes, 1))
        errors = self._row_errors(best)
        for stretch in stretches:
            other = self.improve(self.start(stretch), passes=min(passes, 1))
            found = self._row_errors(other)
            better = found < errors  # [N]
            best = dataclasses.replace(
                best,
                codes=torch.where(better, other.codes, best.codes),
                scales=torch.where(better, other.scales, best.scales),
            )
            errors = torch.where(better, found, errors)
        return self.improve(best)

    def improve(self, coding: Coding, *, passes: int | None = None) -> Coding:
        """Coordinate descent and refit in turn, until no code changes or the passes (default: the config's) end."""
        for turn in range((self._config.descent_passes if passes is None else passes) + 1):
            if turn:
                coding, changed = coordinate_descent(self._target, self._damped.matrix, coding)
                if not changed:
                    break
            if self._config.refit:
                coding = refit_scales(self._projected, self._damped.matrix, coding)
        return coding

    def polish(self, coding: Coding, seed: int) -> Coding:
        """What [`polish`] makes of the codes, as far as coordinate descent and refit can follow."""
        steps = self._config.polish
        return self.improve(polish(self._target, self._damped.matrix, coding, steps=steps, seed=seed))

    def pack(self, coding: Coding) -> tuple[TernaryWeight, torch.Tensor]:
        """The packed weight, and what it stands for: float `[K, N]`."""
        exact = coding.scales.T.float()  # [N, G]
        scale, multiplier = self._spec.round_scales(exact)
        rounded = group_scales(scale, multiplier).to(self._target).T.contiguous()
        coding = dataclasses.replace(coding, scales=rounded)
        if self._config.descent_passes:
            coding, _ = coordinate_descent(self._target, self._damped.matrix, coding)
        packed = TernaryWeight(self._spec, pack_planes(coding.codes.T.contiguous()), scale, multiplier)
        return packed, coding.dense()

    def _row_errors(self, coding: Coding) -> torch.Tensor:
        return self._damped.row_errors(self._target - coding.dense())
