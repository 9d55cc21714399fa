# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map in plain torch: what every kernel is tested against, and what serves where none exists."""

import torch
import torch.nn.functional as F

from ..format import expand_scales, group_scales, unpack_planes
from ..ternarize import rotate
from .operands import PackedWeight


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Codes times scales `[N, K]`: a float32 product, rounded once."""
    scales = expand_scales(group_scales(weight.scale, weight.multiplier), weight.group_size, weight.in_features)
    return (unpack_planes(weight.packed, weight.in_features) * scales).to(dtype)


def integer_weight(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as integers times a scale per row.

    Returns:
        int8 `[N, K]` of codes times integer multipliers of 0..63, and float32 scales `[N]`. Scales of groups without
        multipliers become the nearest integer of 1..63 times 1/63 of the row's largest.
    """
    codes = unpack_planes(weight.packed, weight.in_features)
    scale, multiplier = weight.scale.float(), weight.multiplier
    if multiplier is None:
        if scale.shape[1] == 1:
            return codes.contiguous(), scale[:, 0]
        largest = scale.amax(dim=1, keepdim=True)
        ratio = scale / torch.where(largest > 0, largest, 1.0)
        multiplier, scale = (ratio * 63 + 0.5).floor().clamp(min=1) * (scale > 0), largest
    wide = multiplier.to(torch.int8).repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]
    return (codes * wide).contiguous(), scale[:, 0] / 63


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str = "none"
) -> torch.Tensor:
    """`rotate(x) @ W.T + bias` with W dequantized.

    Args:
        x (`torch.Tensor`): `[..., K]` float.
        weight ([`PackedWeight`]): W.
        bias (`torch.Tensor`, *optional*): `[N]`.
        activation_dtype (`str`): `"none"` and `"auto"` multiply `x` as it is; `"int8"` and `"float8_e4m3fn"` round it
            per token first (fake quantization), as the kernels for those dtypes do.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`.
    """
    dense = dequantize(weight, x.dtype)
    return F.linear(operand(x, weight, activation_dtype), dense, None if bias is None else bias.to(x.dtype))


def operand(x: torch.Tensor, weight: PackedWeight, activation_dtype: str) -> torch.Tensor:
    """What the codes of a weight are multiplied by: `x` rotated as they ask for, and rounded if that was asked for."""
    x = rotate(x, weight.hadamard)
    return fake_quantize_activations(x, activation_dtype) if activation_dtype in ("int8", "float8_e4m3fn") else x


def fake_quantize_activations(x: torch.Tensor, activation_dtype: str) -> torch.Tensor:
    """Rounds each token to int8 or float8_e4m3fn with an absmax scale, and back.

    Args:
        x (`torch.Tensor`): `[..., K]` float.
        activation_dtype (`str`): `"int8"` (scale max|x| / 127, half to even) or `"float8_e4m3fn"` (max|x| / 448).

    Returns:
        `torch.Tensor`: like `x`. A row of zeros stays zero; a row with NaN or Inf becomes NaN.
    """
    x32 = x.float()
    largest = x32.abs().amax(dim=-1, keepdim=True)
    limit = 127.0 if activation_dtype == "int8" else 448.0
    scale = largest / limit
    scaled = torch.where(scale > 0, x32 / scale, torch.zeros_like(x32))
    scaled = torch.where(torch.isfinite(largest), scaled, largest * float("nan"))
    if activation_dtype == "int8":
        rounded = scaled.round()
    else:
        rounded = scaled.to(torch.float8_e4m3fn).float()
    return (rounded * scale).to(x.dtype)
