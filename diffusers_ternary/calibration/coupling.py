# SPDX-License-Identifier: Apache-2.0
"""Codes of all rows of a weight together: later rows make up for what the errors of earlier ones do to the output.

GPTQ's feedback a second time, over the rows, as in YAQA (Tseng et al., arXiv 2505.22988).
"""

import dataclasses

import torch

from ..format import TernarySpec
from ..ternarize import TernaryWeight
from .codes import CodeSearch
from .config import SolverConfig
from .gptq import Coding
from .hessian import DampedHessian, damp
from .polish import polish


# Rows of a block are solved at once, as if their outputs were independent.
ROW_BLOCKS = 16


class CoupledSearch:
    """Chooses codes and scales with a small tr(A E H Eᵀ), E = W - Ŵ, as [`CodeSearch`] does for A = I.

    The rows are split into blocks that are solved one after the other. With R Rᵀ = A (R upper triangular) and the
    residual E of the rows < a, the rows a..b are solved for `Wᵀ + Eᵀ R[:a, a:b] R[a:b, a:b]⁻¹`, which is the best
    that they can do about it.

    Args:
        target (`torch.Tensor`): float `[K, N]`, the transposed weight.
        damped ([`DampedHessian`]): H.
        spec ([`TernarySpec`]): group size and scale layout.
        config ([`SolverConfig`]): which stages run.
        outputs (`torch.Tensor`): A, `[N, N]`, positive definite.
    """

    def __init__(
        self,
        target: torch.Tensor,
        damped: DampedHessian,
        spec: TernarySpec,
        config: SolverConfig,
        outputs: torch.Tensor,
    ) -> None:
        self._target, self._damped, self._spec, self._config = target, damped, spec, config
        self._wanted = target.clone()  # what the rows are solved for
        rows = torch.arange(target.shape[1], device=target.device)
        # Neighbors, which are of the same head, go to different blocks: the best remedy for a row is in a later block.
        self._blocks = [rows[first::ROW_BLOCKS] for first in range(min(ROW_BLOCKS, len(rows)))]
        order = torch.cat(self._blocks)
        self._outputs = outputs
        self._upper = damp(outputs[order][:, order], 0.0).upper

    def start(self) -> Coding:
        """What [`CodeSearch`] starts from, every row for itself."""
        return CodeSearch(self._target, self._damped, self._spec, self._config).start()

    def search(self, start: Coding) -> Coding:
        """Solves block after block, each from a start of its own (`start` gives the shape), and sweeps once more."""
        coding = dataclasses.replace(start, codes=torch.empty_like(start.codes), scales=torch.empty_like(start.scales))
        residual = torch.zeros_like(self._target)  # in the order of the blocks
        first = 0
        for rows in self._blocks:
            block = slice(first, first + len(rows))
            pushed = residual[:, :first] @ self._upper[:first, block]
            feedback = torch.linalg.solve_triangular(self._upper[block, block], pushed, upper=True, left=False)
            self._wanted[:, rows] = wanted = self._target[:, rows] + feedback
            search = CodeSearch(wanted, self._damped, self._spec, self._config)
            found = search.search(search.start())
            coding.codes[:, rows], coding.scales[:, rows] = found.codes, found.scales
            residual[:, block] = self._target[:, rows] - found.dense()
            first = block.stop
        return self._sweep(coding)

    # There is no better way to go on from codes for another target.
    improve = search

    def polish(self, coding: Coding, seed: int) -> Coding:
        """What [`polish`] makes of the codes of all rows together, as far as a sweep over the blocks can follow."""
        steps, hessian = self._config.polish, self._damped.matrix
        return self._sweep(polish(self._target, hessian, coding, steps=steps, outputs=self._outputs, seed=seed))

    def _sweep(self, coding: Coding) -> Coding:
        """Every block in turn goes on from its codes, for the best that it can do about all other rows."""
        coding = dataclasses.replace(coding, codes=coding.codes.clone(), scales=coding.scales.clone())
        residual = self._target - coding.dense()
        for rows in self._blocks:
            own = self._outputs[rows][:, rows]
            pushed = residual @ self._outputs[:, rows] - residual[:, rows] @ own
            self._wanted[:, rows] = wanted = self._target[:, rows] + torch.linalg.solve(own, pushed, left=False)
            part = dataclasses.replace(coding, codes=coding.codes[:, rows], scales=coding.scales[:, rows])
            found = CodeSearch(wanted, self._damped, self._spec, self._config).improve(part)
            coding.codes[:, rows], coding.scales[:, rows] = found.codes, found.scales
            residual[:, rows] = self._target[:, rows] - found.dense()
        return coding

    def pack(self, coding: Coding) -> tuple[TernaryWeight, torch.Tensor]:
        """The packed weight, and what it stands for: float `[K, N]`."""
        return CodeSearch(self._wanted, self._damped, self._spec, self._config).pack(coding)
