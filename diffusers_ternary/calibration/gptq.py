# SPDX-License-Identifier: Apache-2.0
"""GPTQ for ternary codes: rounds column by column and lets the columns to come make up for the error so far.

Frantar et al., arXiv 2210.17323, with the scale of a group chosen on its *compensated* columns. Everything is
transposed, `[K, N]`, so that a column of the weight is contiguous in memory.
"""

import dataclasses

import torch

from ..kernels.cpu import coding as compiled
from ..ternarize import ROUNDINGS


# Columns that are rounded between two matrix products; the work inside a block stays in the cache.
BLOCK_COLUMNS = 128
# Columns for which the product with all others is taken at once: with fewer, a CPU reads more than it multiplies.
PANEL_COLUMNS = 512


@dataclasses.dataclass(frozen=True)
class Coding:
    """Codes and scales of a transposed weight, not packed yet.

    Args:
        codes (`torch.Tensor`): int8 `[K, N]` in {-1, 0, 1}.
        scales (`torch.Tensor`): float `[G, N]`, not negative.
        group_size (`int`): columns of the weight that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    def dense(self) -> torch.Tensor:
        """The weight it stands for, float `[K, N]`."""
        columns, rows = self.codes.shape
        if self.scales.shape[0] == 1:
            return self.codes * self.scales
        if columns % self.group_size == 0:
            groups = self.codes.reshape(-1, self.group_size, rows)
            return (groups * self.scales[:, None]).view(columns, rows)
        return self.codes * self.scales.repeat_interleave(self.group_size, dim=0)[:columns]


def nearest_codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes t in {-1, 0, 1} with t · scale nearest to `values`; 0 where the scale is 0. Same dtype as `values`."""
    half = 0.5 * scale
    codes = (values > half).to(values.dtype) - (values < -half).to(values.dtype)
    return torch.where(scale > 0, codes, torch.zeros_like(codes))


def group_slices(columns: int, group_size: int) -> list[slice]:
    """The columns of each group."""
    return [slice(start, min(start + group_size, columns)) for start in range(0, columns, group_size)]


def gptq(
    weight: torch.Tensor, upper: torch.Tensor, *, group_size: int, rounding: str = "twn", stretch: float = 1.0
) -> Coding:
    """Codes and scales of a weight, vectorized over its rows.

    With R Rᵀ = H (R upper triangular) and the residual E = W - Ŵ of the columns < a, the optimal compensation of the
    columns a..b is `E R[:a, a:b] R[a:b, a:b]⁻¹` (GPTQ with U = chol(H⁻¹)ᵀ = R⁻¹, of which it needs diagonal
    blocks only).

    Args:
        weight (`torch.Tensor`): float `[K, N]`, the transposed weight.
        upper (`torch.Tensor`): `[K, K]`, R of [`DampedHessian`].
        group_size (`int`): columns that share a scale.
        rounding (`str`): rule that chooses a group's scale (see [`ternarize`]).
        stretch (`float`): factor on the scale that the rule gives; above 1, more codes are 0.
    """
    columns, rows = weight.shape
    residual = torch.zeros_like(weight)
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    pushes = _Pushes(residual, upper)
    scales = []
    for group in group_slices(columns, group_size):
        target = _compensated(weight, pushes, group)  # [L, N]
        count = torch.tensor([float(target.shape[0])], device=weight.device)
        rounded = ROUNDINGS[rounding](target.T.float().unsqueeze(1).contiguous(), count)
        scale = stretch * rounded.scales[:, 0].to(weight.dtype)  # [N]
        scales.append(scale)
        for start in range(group.start, group.stop, BLOCK_COLUMNS):
            block = slice(start, min(start + BLOCK_COLUMNS, group.stop))
            if start > group.start:
                target = _compensated(weight, pushes, block)
            _round_block(target[: block.stop - block.start], scale, upper[block, block], codes[block])
            residual[block] = weight[block] - codes[block] * scale
    return Coding(codes, torch.stack(scales), group_size)


class _Pushes:
    """E R[:a, a:b] of parts a..b, which come from left to right.

    What lies before a panel of parts is multiplied once for all of them.
    """

    def __init__(self, residual: torch.Tensor, upper: torch.Tensor) -> None:
        self.upper = upper
        self._residual = residual
        self._panel = slice(0, 0)
        self._before = residual[:0]

    def of(self, part: slice) -> torch.Tensor:
        """`[L, N]`, transposed."""
        if part.stop - part.start > PANEL_COLUMNS:
            return self._product(slice(0, part.start), part)
        if part.stop > self._panel.stop:
            self._panel = slice(part.start, min(part.start + PANEL_COLUMNS, len(self.upper)))
            self._before = self._product(slice(0, part.start), self._panel)
        start = self._panel.start
        return self._before[part.start - start : part.stop - start] + self._product(slice(start, part.start), part)

    def _product(self, before: slice, part: slice) -> torch.Tensor:
        return self.upper[before, part].T @ self._residual[before]


def _compensated(weight: torch.Tensor, pushes: _Pushes, part: slice) -> torch.Tensor:
    # (E R) R_bb⁻¹, transposed: solves R_bbᵀ X = (E R)ᵀ.
    block = pushes.upper[part, part]
    return weight[part] + torch.linalg.solve_triangular(block.T, pushes.of(part), upper=False)


def _round_block(target: torch.Tensor, scale: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor) -> None:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    # What the error of a column moves those after it by.
    moves = inverse / -inverse.diagonal()[:, None]
    if compiled.serves(target) and compiled.serves(upper):
        compiled.code_columns(target, moves.contiguous(), scale[None], codes, group_size=len(upper))
        return
    for j in range(len(upper)):
        code = nearest_codes(target[j], scale)
        codes[j] = code
        target[j + 1 :].addr_(moves[j, j + 1 :], code * scale - target[j], alpha=-1)
