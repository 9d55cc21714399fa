# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for packed ternary weights (CUDA, ROCm, XPU). Triton is imported at the first call."""

import functools
import importlib.util
import logging

import torch

from .. import reference


logger = logging.getLogger(__name__)

__all__ = ["dequantize", "linear", "unavailable_reason"]


@functools.cache
def unavailable_reason(device_type: str, index: int = 0) -> str | None:
    """Why the kernels cannot serve a device; `None` where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .devices import target_of

    target = target_of(device_type, index)
    if target is None:
        return f"Triton has no backend for {device_type}"
    if not target.supported:
        return f"compute capability {target.arch} is below 80"
    return None


@functools.cache
def _serves(device_type: str, index: int) -> bool:
    reason = unavailable_reason(device_type, index)
    if reason is not None:
        logger.warning("Ternary layers on %s:%d use the torch reference: %s.", device_type, index, reason)
    else:
        logger.info("Ternary layers on %s:%d use the Triton kernels.", device_type, index)
    return reason is None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str,
) -> torch.Tensor:
    """`x @ W.T + bias` with packed ternary W; the reference serves, with one log line, where Triton cannot.

    Args:
        x (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        activation_dtype (`str`): `"auto"`, `"none"`, `"int8"` or `"float8_e4m3fn"`.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`. With 8-bit activations the scales of groups are integers of 1..63
        times a row scale: exact for the `"double"` layout in int8, within 1/126 of the row's largest scale for the
        `"group"` layout, and rounded to four significant bits (at most 1/16) in float8.
    """
    # Whoever asks for float64 wants exact numbers (gradient checks), not speed.
    if x.dtype == torch.float64 or not _serves(x.device.type, x.device.index or 0):
        return reference.linear(
            x,
            weight,
            scale,
            multiplier,
            bias,
            in_features=in_features,
            group_size=group_size,
            activation_dtype=activation_dtype,
        )
    from .product import multiply
    from .weights import PackedWeight

    packed = PackedWeight(
        weight.contiguous(),
        scale.contiguous(),
        None if multiplier is None else multiplier.contiguous().view(torch.int8),
        in_features,
        group_size,
    )
    return multiply(x, packed, bias, activation_dtype)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense weight `[N, K]`, equal bit for bit to the reference's; arguments as in [`linear`]."""
    if dtype == torch.float64 or not _serves(weight.device.type, weight.device.index or 0):
        return reference.dequantize(
            weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype
        )
    from .devices import current, target_of
    from .launch import unpack_float
    from .weights import PackedWeight

    target = target_of(weight.device.type, weight.device.index or 0)
    assert target is not None  # `_serves` has asked
    packed = PackedWeight(
        weight.contiguous(),
        scale.contiguous(),
        None if multiplier is None else multiplier.contiguous().view(torch.int8),
        in_features,
        group_size,
    )
    with current(weight.device):
        return unpack_float(packed, dtype, inline_ptx=target.inline_ptx)
