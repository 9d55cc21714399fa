# SPDX-License-Identifier: Apache-2.0
"""Quantize-dequantize with straight-through gradients: what is multiplied in training is what will be stored.

LSQ (Esser et al., arXiv 1902.08153) for three levels, one learned step size per group of columns:

    w_hat   = s * T,    T = clip(round(w / s), -1, 1)
    dL/dw   = dL/dw_hat * 1[|w| <= s]
    dL/ds   = sum over the group of dL/dw_hat * (T - (w / s) * 1[|w| <= s])

Scales and low-rank factors are rounded to their stored values first, with the gradient of the identity.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..format import double_quantize, expand_scales, group_count, group_scales


def stored_scales(
    scales: torch.Tensor, *, layout: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rounds group scales to what a file holds.

    Args:
        scales (`torch.Tensor`): float32 `[N, G]`. Zero stays zero (a group of zeros); anything else is kept positive
            and within the range of `dtype`.
        layout (`str`): `"group"` or `"double"`.
        dtype (`torch.dtype`): of the stored scale.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `weight_scale` and `weight_multiplier` of a [`TernarySpec`].
    """
    limits = torch.finfo(dtype)
    bounded = scales.clamp(limits.smallest_normal, limits.max)
    bounded = torch.where(scales == 0, torch.zeros_like(scales), bounded)
    if layout == "double":
        return double_quantize(bounded, dtype=dtype)
    return bounded.to(dtype), None


def round_scales(scales: torch.Tensor, *, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Effective scales float32 `[N, G]` after [`stored_scales`]; the gradient passes straight through."""
    return _RoundScales.apply(scales, layout, dtype)


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 `values` rounded to what `dtype` can hold; the gradient passes straight through."""
    return _RoundTo.apply(values, dtype)


def ternary_codes(latent: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Codes T of latents `[N, K]` under effective scales `[N, G]`, in the dtype of the latents."""
    return _codes(_ratio(latent, scales, group_size))


def fake_quantize(latent: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """w_hat of latents float32 `[N, K]` under effective scales `[N, G]`, with LSQ's gradients for both."""
    return _FakeQuantize.apply(latent, scales, group_size)


def consistent_latent(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, *, margin: float
) -> torch.Tensor:
    """Latents as close to a float weight as the given codes allow.

    Calibration moves codes away from round(w / s) on purpose. Where it did not, the latent is the weight; elsewhere
    it is moved just inside the cell of its code.

    Args:
        weight (`torch.Tensor`): float `[N, K]`, in the basis of the codes (rotated, if they are).
        codes (`torch.Tensor`): int8 `[N, K]`.
        scales (`torch.Tensor`): float32 `[N, G]`, effective.
        group_size (`int`): columns per scale.
        margin (`float`): distance from the cell's border, as a fraction of the scale, 0 to 0.5.

    Returns:
        `torch.Tensor`: float32 `[N, K]` with `ternary_codes(...)` equal to `codes`.
    """
    spread = expand_scales(scales, group_size, weight.shape[1])
    ratio = _ratio(weight.float(), scales, group_size)
    low = torch.where(codes > 0, 0.5 + margin, torch.where(codes < 0, -torch.inf, -0.5 + margin))
    high = torch.where(codes < 0, -0.5 - margin, torch.where(codes > 0, torch.inf, 0.5 - margin))
    agrees = _codes(ratio) == codes
    moved = torch.where(agrees, weight.float(), ratio.clamp(low, high) * spread)
    # Rounding may carry a latent that agreed by a hair, or one moved with no margin, over the border.
    drifted = _codes(_ratio(moved, scales, group_size)) != codes
    return torch.where(drifted, codes * spread, moved)


def _ratio(latent: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    # A group of scale 0 holds zeros, whatever its latents are. Groups are divided by, not weights: that is cheaper.
    return _scaled(latent, torch.where(scales > 0, 1 / scales, 0.0), group_size)


def _scaled(values: torch.Tensor, factors: torch.Tensor, group_size: int) -> torch.Tensor:
    """Values `[N, K]` times the factor of their group, `[N, G]`."""
    rows, columns = values.shape
    if columns % group_size:
        return values * expand_scales(factors, group_size, columns)
    # The factors are spread while they are read: training is bound by passes over the weights.
    return (values.reshape(rows, -1, group_size) * factors.unsqueeze(2)).view(rows, columns)


def _codes(ratio: torch.Tensor) -> torch.Tensor:
    return ratio.round().clamp_(-1, 1)


def _group_sums(values: torch.Tensor, group_size: int) -> torch.Tensor:
    rows, columns = values.shape
    groups = group_count(columns, group_size)
    missing = groups * group_size - columns
    whole = F.pad(values, (0, missing)) if missing else values
    return whole.view(rows, groups, group_size).sum(dim=2)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
        ctx.save_for_backward(latent, scales)  # the rest is cheaper to compute again than to keep
        ctx.group_size = group_size
        return _scaled(_codes(_ratio(latent, scales, group_size)), scales, group_size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        latent, scales = ctx.saved_tensors
        ratio = _ratio(latent, scales, ctx.group_size)
        inside = ratio.abs() <= 1
        grad_latent = grad * inside if ctx.needs_input_grad[0] else None
        grad_scales = None
        if ctx.needs_input_grad[1]:
            moved = _codes(ratio).sub_(ratio.mul_(inside)).mul_(grad)
            grad_scales = _group_sums(moved, ctx.group_size)
        return grad_latent, grad_scales, None


class _RoundScales(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scales: torch.Tensor, layout: str, dtype: torch.dtype) -> torch.Tensor:
        return group_scales(*stored_scales(scales, layout=layout, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None, None


class _RoundTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        limits = torch.finfo(dtype)
        return values.clamp(limits.min, limits.max).to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None
