# SPDX-License-Identifier: Apache-2.0
"""The inputs that codes are multiplied by: those of the layer, scaled one by one and then rotated."""

import dataclasses

import torch

from ..format import COLUMN_SCALE_DTYPE
from ..ternarize import rotate
from .hessian import DampedHessian, damp


# Of the mean diagonal: keeps the solve for the scales regular where inputs are collinear.
_RIDGE = 1e-6
# A scale falls to this share of what it was at most, so that none becomes negative or 0.
_LEAST_SHARE = 0.05
_RANGE = (
    1e-3  # of a scale and its inverse, times the geometric mean: float16 holds them, and their products with inputs
)


@dataclasses.dataclass(frozen=True)
class Basis:
    """W = Q R diag(s): codes and group scales Q are chosen for R diag(s) x.

    Args:
        block (`int`): of the rotation R; 0 = none.
        scale (`torch.Tensor`, *optional*): s, `[K]` float with the values that are stored; `None` = 1.
    """

    block: int = 0
    scale: torch.Tensor | None = None

    def inputs(self, damped: DampedHessian, name: str) -> DampedHessian:
        """R S H S R, the moments of the inputs."""
        if not self.block and self.scale is None:
            return damped
        matrix = damped.matrix
        if self.scale is not None:
            matrix = matrix * self.scale * self.scale[:, None]
        if self.block:
            matrix = rotate(rotate(matrix, self.block).T.contiguous(), self.block)
        # As positive definite as H was; more is added only where round-off says otherwise.
        return dataclasses.replace(damp(matrix, 0.0, name=name), damping=damped.damping)

    def weight(self, target: torch.Tensor) -> torch.Tensor:
        """What Q is to be for a weight `[K, N]`: R S⁻¹ W."""
        return self._rotated(target if self.scale is None else target / self.scale[:, None])

    def dense(self, coded: torch.Tensor) -> torch.Tensor:
        """The weight `[K, N]` that Q `[K, N]` stands for: S R Q."""
        rotated = self._rotated(coded)
        return rotated if self.scale is None else rotated * self.scale[:, None]

    def refit(
        self,
        target: torch.Tensor,
        hessian: torch.Tensor,
        coded: torch.Tensor,
        outputs: torch.Tensor | None = None,
    ) -> "Basis":
        """The scales that are best for codes and group scales, by least squares under H.

        With P = R Q the error tr(E H Eᵀ), E = W - S P, is least where `((P Pᵀ) ∘ H) s = diag(P Wᵀ H)`; by Schur's
        product theorem the matrix is positive definite as H is. Of tr(A E H Eᵀ) it is P A in place of one P.

        Args:
            target (`torch.Tensor`): W, `[K, N]`.
            hessian (`torch.Tensor`): H, `[K, K]`.
            coded (`torch.Tensor`): Q, `[K, N]`.
            outputs (`torch.Tensor`, *optional*): A, `[N, N]`.
        """
        assert self.scale is not None
        plain = self._rotated(coded)
        weighted = plain if outputs is None else plain @ outputs
        system = (weighted @ plain.T) * hessian
        wanted = (weighted * (hessian @ target)).sum(dim=1)
        empty = system.diagonal() <= 0
        system.diagonal().add_(torch.where(empty, 1.0, _RIDGE * system.diagonal().mean()))
        scale = torch.linalg.solve(system, wanted)
        return dataclasses.replace(self, scale=_stored(torch.maximum(scale, _LEAST_SHARE * self.scale)))

    def _rotated(self, matrix: torch.Tensor) -> torch.Tensor:
        """R M for M `[K, N]`."""
        return rotate(matrix.T, self.block).T.contiguous() if self.block else matrix


def first_basis(target: torch.Tensor, hessian: torch.Tensor, block: int) -> Basis:
    """Where the search for column scales begins.

    Codes have one magnitude in a group, so without a rotation each column gets the magnitude of its weights. A
    rotation spreads the error of a group evenly over its inputs, and then large inputs are to be smaller:
    s = H_jj^(-1/8). Both exponents are the best of those tried on the Scenes teacher (METHODS.md).

    Args:
        target (`torch.Tensor`): W, `[K, N]`.
        hessian (`torch.Tensor`): H, `[K, K]`.
        block (`int`): of the rotation; 0 = none.
    """
    scale = hessian.diagonal().pow(-1 / 8) if block else target.square().mean(dim=1).sqrt()
    return Basis(block, _stored(scale))


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Scales with a geometric mean of 1, as they will be read from a file; what is not positive becomes 1."""
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    scale = (scale / scale.log().mean().exp()).clamp(_RANGE, 1 / _RANGE)
    return scale.to(COLUMN_SCALE_DTYPE).to(scale)
