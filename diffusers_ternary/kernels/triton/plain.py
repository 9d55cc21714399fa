# SPDX-License-Identifier: Apache-2.0
"""The product in plain torch: what kernels are tried against, and what serves where none of them is right.

It rounds what the kernels round (activations to 8 bits, multipliers of groups) and sums in the dtype it is asked for.
"""

import dataclasses

import torch
import torch.nn.functional as F

from .weights import PackedWeight


LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # largest values of the 8-bit dtypes


def codes(weight: PackedWeight) -> torch.Tensor:
    """The codes, int8 `[N, K]` of -1, 0 and 1."""
    planes = [((weight.packed << 2 * plane) & -64) >> 6 for plane in range(4)]
    return torch.cat(planes, dim=1)[:, : weight.in_features]


def integer_multipliers(weight: PackedWeight) -> PackedWeight:
    """Group scales as integer multipliers of a row scale (see `derive_multipliers_kernel`)."""
    scale = weight.scale.float()
    largest = scale.amax(dim=1, keepdim=True)
    ratio = scale / torch.where(largest > 0, largest, torch.ones_like(largest))
    multiplier = (ratio * 63 + 0.5).floor().clamp(min=1) * (scale > 0)
    return dataclasses.replace(weight, scale=largest, multiplier=multiplier.to(torch.int8))


def dequantize(weight: PackedWeight, dtype: torch.dtype, *, float8_multipliers: bool = False) -> torch.Tensor:
    """Codes times scales `[N, K]`, a float32 product rounded once; float8 rounds multipliers to four bits."""
    scale = weight.scale.float()
    if weight.multiplier is not None:
        multiplier = weight.multiplier.float()
        if float8_multipliers:
            multiplier = multiplier.to(torch.float8_e4m3fn).float()
        scale = scale * multiplier / 63
    scales = scale.repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]
    return (codes(weight) * scales).to(dtype)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R` for x `[M, K]`, R = H / sqrt(block) on each whole block of columns; rounded once to the dtype of x."""
    whole = x.shape[1] - x.shape[1] % block
    y = x[:, :whole].float()
    width = 1
    while width < block:
        low, high = y.reshape(x.shape[0], -1, 2, width).unbind(2)
        y = torch.stack((low + high, low - high), dim=2).reshape(x.shape[0], whole)
        width *= 2
    return torch.cat(((y * block**-0.5).to(x.dtype), x[:, whole:]), dim=1)


def round_activations(x: torch.Tensor, activation_dtype: str) -> torch.Tensor:
    """Tokens rounded to int8 or float8 with an absmax scale, as float32; NaN where a token is not finite."""
    limit = LIMITS[activation_dtype]
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x * torch.where(largest > 1e-30, limit / largest, torch.zeros_like(largest))
    rounded = scaled.round() if activation_dtype == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return rounded * torch.where(largest.isfinite(), largest / limit, torch.full_like(largest, float("nan")))


def product(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_dtype: str,
    *,
    dtype: torch.dtype | None = None,
    float8_multipliers: bool = False,
) -> torch.Tensor:
    """`rotate(x) @ W.T + bias`.

    Args:
        x (`torch.Tensor`): `[M, K]` float.
        weight ([`PackedWeight`]): on the device of `x`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        activation_dtype (`str`): `"none"`, `"int8"` or `"float8_e4m3fn"`.
        dtype (`torch.dtype`, *optional*): of the product and the result; that of `x` by default.
        float8_multipliers (`bool`): rounds the multipliers of groups as scaled float8 codes do.
    """
    dtype = dtype or x.dtype
    if weight.hadamard:
        # With 8-bit activations the kernels do not round to 16 bits in between.
        x = rotate(x if activation_dtype == "none" else x.float(), weight.hadamard)
    if activation_dtype != "none":
        x = round_activations(x, activation_dtype)
        if weight.multiplier is None and not weight.per_row:
            weight = integer_multipliers(weight)
    dense = dequantize(weight, dtype, float8_multipliers=float8_multipliers)
    return F.linear(x.to(dtype), dense, None if bias is None else bias.to(dtype))
