# SPDX-License-Identifier: Apache-2.0
"""GPTQ for ternary codes: rounds column by column and lets the columns to come make up for the error so far.

Frantar et al., arXiv 2210.17323, with the scale of a group chosen on its *compensated* columns. Everything is
transposed, `[K, N]`, so that a column of the weight is contiguous in memory.
"""

import dataclasses

import torch

from ..ternarize import ROUNDINGS


# Columns that are rounded between two matrix products; the work inside a block stays in the cache.
BLOCK_COLUMNS = 128


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
        if self.scales.shape[0] == 1:
            return self.codes * self.scales
        return self.codes * self.scales.repeat_interleave(self.group_size, dim=0)[: self.codes.shape[0]]


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
    scales = []
    for group in group_slices(columns, group_size):
        target = _compensated(weight, residual, upper, group)  # [L, N]
        count = torch.tensor([float(target.shape[0])], device=weight.device)
        rounded = ROUNDINGS[rounding](target.T.float().unsqueeze(1).contiguous(), count)
        scale = stretch * rounded.scales[:, 0].to(weight.dtype)  # [N]
        scales.append(scale)
        for start in range(group.start, group.stop, BLOCK_COLUMNS):
            block = slice(start, min(start + BLOCK_COLUMNS, group.stop))
            if start > group.start:
                target = _compensated(weight, residual, upper, block)
            _round_block(target[: block.stop - block.start], block, scale, upper, codes)
            residual[block] = weight[block] - codes[block] * scale
    return Coding(codes, torch.stack(scales), group_size)


def _compensated(weight: torch.Tensor, residual: torch.Tensor, upper: torch.Tensor, part: slice) -> torch.Tensor:
    pushed = upper[: part.start, part].T @ residual[: part.start]  # [L, N]
    # (E R) R_bb⁻¹, transposed: solves R_bbᵀ X = (E R)ᵀ.
    return weight[part] + torch.linalg.solve_triangular(upper[part, part].T, pushed, upper=False)


def _round_block(
    target: torch.Tensor, block: slice, scale: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor
) -> None:
    size = block.stop - block.start
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper[block, block], identity, upper=True)
    for j in range(size):
        code = nearest_codes(target[j], scale)
        codes[block.start + j] = code
        error = (target[j] - code * scale) / inverse[j, j]
        target[j + 1 :].addr_(inverse[j, j + 1 :], error, alpha=-1)
