# SPDX-License-Identifier: Apache-2.0
"""The low-rank correction of a ternary weight: what its codes miss, as a product of two thin matrices."""

import dataclasses

import torch

from ..format import LOW_RANK_DTYPE


# Of the randomized range finder (Halko et al., arXiv 0909.4061): the spectrum of a rounding error decays slowly.
_OVERSAMPLING = 8
_POWER_ITERATIONS = 4
# Below this many rows or columns the exact decomposition is cheap enough.
_EXACT_SIDE = 512


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix `up @ down`.

    Args:
        up (`torch.Tensor`): float16 `[N, r]`.
        down (`torch.Tensor`): float16 `[r, K]`.
    """

    up: torch.Tensor
    down: torch.Tensor

    def part(self, features: slice) -> "LowRank":
        """The correction of some output features."""
        return LowRank(self.up[features], self.down)

    def dense(self) -> torch.Tensor:
        """The product, float32 `[N, K]`."""
        return self.up.float() @ self.down.float()


def low_rank_residual(residual: torch.Tensor, rank: int, *, whitening: torch.Tensor | None = None) -> LowRank:
    """Best rank-r approximation of a residual weight.

    Without whitening it minimizes |E - U V|; with S, a square root of H = E[x x^T] (S S^T = H), it minimizes
    |(E - U V) S|, the error of the layer's output over its inputs: truncate the SVD of E S and undo S.

    Args:
        residual (`torch.Tensor`): float `[N, K]`, W minus the dequantized codes.
        rank (`int`): r, at least 1.
        whitening (`torch.Tensor`, *optional*): upper triangular `[K, K]` (R of [`DampedHessian`]).

    Returns:
        [`LowRank`], the singular values shared evenly between the two factors, so that float16 holds both.
    """
    target = residual.float() if residual.dtype != torch.float64 else residual
    weighted = target if whitening is None else target @ whitening
    left, values, right = _svd(weighted, rank)
    root = values.sqrt()
    down = right.T if whitening is None else torch.linalg.solve_triangular(whitening, right.T, upper=True, left=False)
    down = down * root[:, None]
    # Whitening takes the units of x out of the factor; balanced again, neither factor leaves float16's range.
    balance = (down.norm() / (left * root).norm().clamp_min(torch.finfo(down.dtype).tiny)).sqrt()
    balance = torch.where(balance > 0, balance, torch.ones_like(balance))
    return LowRank((left * root * balance).to(LOW_RANK_DTYPE), (down / balance).to(LOW_RANK_DTYPE))


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets `[N, r]`, `[r]`, `[K, r]`; the same for the same matrix, whatever was drawn before."""
    if min(matrix.shape) <= _EXACT_SIDE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank]
