# SPDX-License-Identifier: Apache-2.0
"""One layer: from a float weight and the moments of its inputs to a packed ternary weight and a bias."""

import dataclasses

import torch

from ..format import TernarySpec, normalize_group_size
from ..ternarize import LowRank, TernaryWeight, check_finite, low_rank_residual, rotate, ternarize
from ..ternarize.weight import scale_layout
from .codes import SolvedCodes, row_errors, solve_codes
from .config import SolverConfig
from .hessian import DampedHessian, InputMoments, damp


# Codes and low-rank factors are fitted in turn, each to what the other leaves: the second turn takes off 2 to 4 % of
# the error and the third 1 % (rank 16, Gaussian and heavy-tailed weights of 256 to 1024 columns).
LOW_RANK_TURNS = 2


@dataclasses.dataclass(frozen=True)
class OutputErrors:
    """Errors E|W x - Ŵ x - Δb|² / E|W x|² of a layer's output over the calibration inputs, at each stage.

    Args:
        rounded (`float`): plain TWN rounding, without a change of the bias.
        gptq (`float`): after GPTQ (or rounding, where GPTQ is off), with the change of the bias if asked for.
        solved (`float`): what was packed, scales rounded to their storage.
    """

    rounded: float
    gptq: float
    solved: float


@dataclasses.dataclass(frozen=True)
class SolvedLayer:
    """A calibrated layer.

    Args:
        weight ([`TernaryWeight`]): packed, on the device of the float weight.
        bias_change (`torch.Tensor`, *optional*): float32 `[N]` to add to the bias, (W - Ŵ) E[x].
        errors ([`OutputErrors`]): before and after.
        damping (`float`): fraction of the mean diagonal that was added to H.
    """

    weight: TernaryWeight
    bias_change: torch.Tensor | None
    errors: OutputErrors
    damping: float


def solve_layer(
    weight: torch.Tensor,
    moments: InputMoments,
    *,
    group_size: int | None = 128,
    scales: str = "auto",
    hadamard: int = 0,
    rank: int = 0,
    config: SolverConfig | None = None,
    correct_bias: bool = False,
    name: str = "layer",
) -> SolvedLayer:
    """Chooses codes and scales that keep the layer's output on the inputs that the moments describe.

    Args:
        weight (`torch.Tensor`): float `[N, K]`.
        moments ([`InputMoments`]): of the inputs, on the device to work on; their dtype is the working precision.
        group_size (`int`, *optional*, defaults to 128): columns per scale; `None` = one per row.
        scales (`str`, *optional*, defaults to `"auto"`): scale layout (see [`ternarize`]).
        hadamard (`int`, *optional*, defaults to 0): also solve for inputs that are rotated in blocks of this size, and
            keep the better of both; 0 = never rotate.
        rank (`int`, *optional*, defaults to 0): rank of a correction that is stored beside the codes, the best for
            the inputs (SVD of the residual times a root of H); codes and correction are fitted in turn.
        config ([`SolverConfig`], *optional*): which stages run (see [`solve_codes`]).
        correct_bias (`bool`, *optional*, defaults to `False`): let the bias take over the mean of the error; then
            only the covariance of the inputs counts. For layers that have a bias.
        name (`str`): layer name for messages.

    Raises:
        ValueError: if the weight or the moments hold NaN or Inf, or their widths differ.
    """
    config = config or SolverConfig()
    rows, columns = weight.shape
    if tuple(moments.second.shape) != (columns, columns):
        raise ValueError(
            f"{name}: the statistics are of {moments.second.shape[0]} inputs, but the weight has {columns} columns."
        )
    check_finite(weight, name=name)
    weight = weight.to(moments.second.device)
    size = normalize_group_size(group_size, columns)
    spec = TernarySpec(rows, columns, size, scale_layout(scales, columns, size))
    hessian = moments.covariance() if correct_bias else moments.second
    damped = damp(hessian, config.damping, name=name)
    target = weight.to(hessian).T.contiguous()  # [K, N]
    found = _Solution(target, damped, spec, config, name).best(hadamard, min(rank, rows, columns))

    energy = _quadratic(target, moments.second)
    added = float(damped.matrix.diagonal().double().mean() - hessian.diagonal().double().mean())
    rounded = ternarize(weight, group_size=size, scales=scales, name=name).dequantize().to(target).T
    errors = OutputErrors(
        rounded=_ratio(_quadratic(target - rounded, moments.second), energy),
        gptq=_ratio(_quadratic(target - found.first, hessian), energy),
        solved=_ratio(found.error - added * float((target - found.dense).square().sum(dtype=torch.float64)), energy),
    )
    change = (moments.mean @ (target - found.dense)).float() if correct_bias else None
    return SolvedLayer(found.weight, change, errors, damped.damping)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A packed weight, what it stands for, and what the first stage had found (`[K, N]`, inputs not rotated)."""

    weight: TernaryWeight
    dense: torch.Tensor
    first: torch.Tensor
    error: float


@dataclasses.dataclass(frozen=True)
class _Solution:
    target: torch.Tensor  # [K, N]
    damped: DampedHessian
    spec: TernarySpec
    config: SolverConfig
    name: str

    def best(self, hadamard: int, rank: int) -> _Found:
        """The better of plain and rotated inputs. The low-rank factors see the inputs as they are in both."""
        found = self._solve(0, rank)
        if hadamard and hadamard <= self.spec.in_features:
            rotated = self._solve(hadamard, rank)
            if rotated.error < found.error:
                return rotated
        return found

    def _solve(self, block: int, rank: int) -> _Found:
        hessian = _rotated(self.damped, block, self.name)
        codes = solve_codes(_rotate_columns(self.target, block), hessian, self.spec, self.config)
        first = _rotate_columns(codes.first, block)
        if not rank:
            return self._found(codes, block, None, first)
        turns = []
        for _ in range(LOW_RANK_TURNS):
            left = self.target - _rotate_columns(codes.dense, block)
            low_rank = low_rank_residual(left.T, rank, whitening=self.damped.upper)
            turns.append(self._found(codes, block, low_rank, first))
            remaining = _rotate_columns(self.target - low_rank.dense().to(self.target).T, block)
            codes = solve_codes(remaining, hessian, self.spec, self.config, start=codes.coding)
        return min(turns, key=lambda turn: turn.error)

    def _found(self, codes: SolvedCodes, block: int, low_rank: LowRank | None, first: torch.Tensor) -> _Found:
        dense = _rotate_columns(codes.dense, block)
        rank = 0
        if low_rank is not None:
            dense = dense + low_rank.dense().to(dense).T
            rank = low_rank.down.shape[0]
        spec = dataclasses.replace(codes.weight.spec, hadamard=block, rank=rank)
        weight = dataclasses.replace(codes.weight, spec=spec, low_rank=low_rank)
        error = float(row_errors(self.target - dense, self.damped.matrix).sum(dtype=torch.float64))
        return _Found(weight, dense, first, error)


def _rotate_columns(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """R M for M `[K, N]`."""
    return rotate(matrix.T, block).T.contiguous() if block else matrix


def _rotated(damped: DampedHessian, block: int, name: str) -> DampedHessian:
    """The moments of rotated inputs, R H R."""
    if not block:
        return damped
    matrix = rotate(rotate(damped.matrix, block).T.contiguous(), block)
    # As positive definite as H was; more is added only where round-off says otherwise.
    return dataclasses.replace(damp(matrix, 0.0, name=name), damping=damped.damping)


def _quadratic(error: torch.Tensor, hessian: torch.Tensor) -> float:
    # float64 only for the sum: K * N products of float32 are exact enough, their sum is not.
    return float(((hessian @ error) * error).sum(dtype=torch.float64))


def _ratio(error: float, energy: float) -> float:
    # Round-off can leave a tiny negative error.
    return max(error, 0.0) / energy if energy > 0 else 0.0
