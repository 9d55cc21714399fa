# SPDX-License-Identifier: Apache-2.0
"""One layer: from a float weight and the moments of its inputs to a packed ternary weight and a bias."""

import dataclasses

import torch

from ..format import (
    TernarySpec,
    double_quantize,
    group_scales,
    normalize_group_size,
    pack_planes,
    storage_dtype,
)
from ..ternarize import TernaryWeight, check_finite, ternarize
from ..ternarize.weight import scale_layout
from .config import SolverConfig
from .descent import coordinate_descent, expand
from .gptq import Coding, gptq
from .hessian import DampedHessian, InputMoments, damp
from .refit import refit_scales


# A row of many groups averages the choice between starts away: the error falls by 10 % with 1 group a row, 3 % with
# 4, 2 % with 8 and 1 % with 32 (random weights, correlated inputs), which is not worth a multiple of the time.
MAX_GROUPS_FOR_STARTS = 8


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
    config: SolverConfig | None = None,
    correct_bias: bool = False,
    name: str = "layer",
) -> SolvedLayer:
    """Chooses codes and scales that keep the layer's output on the inputs that the moments describe.

    GPTQ, then coordinate descent and the joint refit of the scales in turn, then the scales are rounded to their
    storage and the codes descend once more against the rounded scales, so that what is packed is what was optimised.

    Args:
        weight (`torch.Tensor`): float `[N, K]`.
        moments ([`InputMoments`]): of the inputs, on the device to work on; their dtype is the working precision.
        group_size (`int`, *optional*, defaults to 128): columns per scale; `None` = one per row.
        scales (`str`, *optional*, defaults to `"auto"`): scale layout (see [`ternarize`]).
        config ([`SolverConfig`], *optional*): which stages run.
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
    projected = damped.matrix @ target  # H Wᵀ, [K, N]
    start = _initial(weight, target, damped, spec, config)
    coding = _search(target, damped, projected, start, size, config)
    packed, coding = _store(target, damped.matrix, coding, spec, config)

    energy = _energy(target, projected, damped, hessian, moments.mean if correct_bias else None)
    rounded = ternarize(weight, group_size=size, scales=scales, name=name).dequantize().to(target).T
    errors = OutputErrors(
        rounded=_ratio(_quadratic(target - rounded, moments.second), energy),
        gptq=_ratio(_quadratic(target - expand(start, size), hessian), energy),
        solved=_ratio(_quadratic(target - expand(coding, size), hessian), energy),
    )
    change = None
    if correct_bias:
        change = (moments.mean @ (target - expand(coding, size))).float()
    return SolvedLayer(packed, change, errors, damped.damping)


def _initial(
    weight: torch.Tensor, target: torch.Tensor, damped: DampedHessian, spec: TernarySpec, config: SolverConfig
) -> Coding:
    if config.gptq:
        return gptq(target, damped.upper, group_size=spec.group_size, rounding=config.rounding)
    rounded = ternarize(weight, group_size=spec.group_size, rounding=config.rounding, scales="group")
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
    errors = _row_errors(target - expand(best, group_size), damped.matrix)
    for stretch in stretches:
        other = gptq(target, damped.upper, group_size=group_size, rounding=config.rounding, stretch=stretch)
        other = _improve(target, damped.matrix, projected, other, group_size, first)
        found = _row_errors(target - expand(other, group_size), damped.matrix)
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


def _energy(
    target: torch.Tensor,
    projected: torch.Tensor,
    damped: DampedHessian,
    hessian: torch.Tensor,
    mean: torch.Tensor | None,
) -> float:
    """E|W x|² from H Wᵀ, without another product: minus what damping added, plus what the covariance leaves out."""
    energy = float((projected * target).sum(dtype=torch.float64))
    added = float(damped.matrix.diagonal().double().mean() - hessian.diagonal().double().mean())
    energy -= added * float(target.square().sum(dtype=torch.float64))
    return energy if mean is None else energy + float((mean @ target).square().sum(dtype=torch.float64))


def _row_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((hessian @ error) * error).sum(dim=0)  # [N]


def _quadratic(error: torch.Tensor, hessian: torch.Tensor) -> float:
    # float64 only for the sum: K * N products of float32 are exact enough, their sum is not.
    return float(((hessian @ error) * error).sum(dtype=torch.float64))


def _ratio(error: float, energy: float) -> float:
    # Round-off can leave a tiny negative error.
    return max(error, 0.0) / energy if energy > 0 else 0.0
