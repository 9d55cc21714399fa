# SPDX-License-Identifier: Apache-2.0
"""The quadratic form of a layer's output error, and its Cholesky factor."""

import dataclasses
import logging

import torch


logger = logging.getLogger(__name__)

_ESCALATION = 10.0
# From the smallest sensible damping, 1e-6 of the mean diagonal, this many steps reach 1e6 times the diagonal, where
# every finite symmetric matrix with a positive mean diagonal is positive definite in float32.
_ATTEMPTS = 14
# Columns of an error that are multiplied at a time: bounds the temporary memory.
_PANEL = 512


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """First and second moments of the inputs x of a linear layer.

    Args:
        second (`torch.Tensor`): `[K, K]`, E[x xᵀ].
        mean (`torch.Tensor`): `[K]`, E[x].
        count (`int`): tokens they were taken over.
        reference ([`ReferenceMoments`], *optional*): of the inputs that the layer was made for, where x is what
            quantized layers before it have left of them.
    """

    second: torch.Tensor
    mean: torch.Tensor
    count: int
    reference: "ReferenceMoments | None" = None

    def covariance(self) -> torch.Tensor:
        """E[x xᵀ] - E[x] E[x]ᵀ, `[K, K]`: what is left of the error once the bias has taken over its mean."""
        return self.second.addr(self.mean, self.mean, alpha=-1)


@dataclasses.dataclass(frozen=True)
class ReferenceMoments:
    """Moments of the inputs r that a layer would get in the float model, with the inputs x that it gets.

    Args:
        cross (`torch.Tensor`): `[K, K]`, E[x rᵀ].
        mean (`torch.Tensor`): `[K]`, E[r].
    """

    cross: torch.Tensor
    mean: torch.Tensor

    def covariance(self, mean: torch.Tensor) -> torch.Tensor:
        """E[x rᵀ] - E[x] E[r]ᵀ, `[K, K]`, from E[x]."""
        return self.cross.addr(mean, self.mean, alpha=-1)


@dataclasses.dataclass(frozen=True)
class DampedHessian:
    """A positive definite H and its factor.

    Args:
        matrix (`torch.Tensor`): `[K, K]`, H + damping · mean(diag H) · I.
        upper (`torch.Tensor`): `[K, K]` upper triangular R with R Rᵀ = `matrix`.
        damping (`float`): what was added, as a fraction of the mean diagonal.
    """

    matrix: torch.Tensor
    upper: torch.Tensor
    damping: float

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """`matrix`⁻¹ times `[K, N]`."""
        half = torch.linalg.solve_triangular(self.upper, right, upper=True)
        return torch.linalg.solve_triangular(self.upper.T, half, upper=False)

    def row_errors(self, error: torch.Tensor) -> torch.Tensor:
        """e H eᵀ of each row e of the error: float64 `[N]` from E `[K, N]`."""
        return _row_errors(error, self.matrix)


def quadratic(error: torch.Tensor, hessian: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    """tr(A E H Eᵀ) of the transpose Eᵀ `[K, N]` of an error, with A `[N, N]` or the unit matrix."""
    if outputs is None:
        return float(_row_errors(error, hessian).sum())
    return float(((hessian @ error) * (error @ outputs)).sum(dtype=torch.float64))


def _row_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
    for start in range(0, len(hessian), _PANEL):
        panel, before = slice(start, start + _PANEL), slice(0, start)
        # H is symmetric: what lies above its diagonal counts twice.
        product = torch.addmm(hessian[panel, panel] @ error[panel], hessian[panel, before], error[before], alpha=2)
        # float64 only for the sum: products of float32 are exact enough, their sum is not.
        sums += product.mul_(error[panel]).sum(dim=0, dtype=torch.float64)
    return sums


def damp(hessian: torch.Tensor, damping: float, *, name: str = "layer") -> DampedHessian:
    """Adds to the diagonal until the Cholesky factorization succeeds.

    R Rᵀ with an *upper* R comes from the ordinary factorization of the matrix with both axes reversed. Its diagonal
    blocks are all that GPTQ needs of chol(H⁻¹), so H is never inverted.

    Args:
        hessian (`torch.Tensor`): float `[K, K]`, symmetric. An all-zero one (a layer whose inputs were all zero)
            becomes the identity: plain rounding.
        damping (`float`): first try, as a fraction of the mean diagonal; multiplied by ten after each failure.
        name (`str`): layer name for messages.

    Raises:
        ValueError: if the matrix is not finite, or no damping makes it positive definite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"{name}: the input statistics hold NaN or Inf. Run the pipeline in bfloat16 or float32 instead of "
            "float16, or accumulate in float64."
        )
    if mean <= 0:
        logger.warning("%s: all its inputs were zero; its weights are rounded without statistics.", name)
        identity = torch.eye(len(diagonal), dtype=hessian.dtype, device=hessian.device)
        return DampedHessian(identity, identity, 0.0)
    current = damping
    for _ in range(_ATTEMPTS):
        matrix = hessian.clone()
        matrix.diagonal().add_(current * mean)
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return DampedHessian(matrix, lower.flip(0, 1), current)
        following = max(current * _ESCALATION, 1e-6)
        logger.warning(
            "%s: H is not positive definite with damping %g; trying %g. More prompts or steps would help.",
            name,
            current,
            following,
        )
        current = following
    raise ValueError(f"{name}: no damping up to {current:g} makes the input statistics positive definite.")
