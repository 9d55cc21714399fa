# SPDX-License-Identifier: Apache-2.0
"""Apple GPUs: a Metal kernel unpacks some rows into one buffer that is used again, and torch multiplies.

It has never run on a Mac: what is tested is the body of the kernel as C, and everything around it. At first use each
kind is compared with the reference, and left out with a warning where it does not compile or disagrees.
"""

import functools
import logging
from typing import Any

import torch

from ...format import group_count
from ...ternarize import rotate
from .. import blocked, reference
from ..triton.trial import TOLERANCE, Trials, problem_of
from .shader import METAL_TYPES, metal_source


__all__ = ["dequantize", "linear"]

logger = logging.getLogger(__name__)

# Elements of the buffer: 32 MB in 16 bits, and large enough products to keep the GPU busy.
BUFFER_ELEMENTS = 1 << 24


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str = "none",
    hadamard: int = 0,
) -> torch.Tensor:
    """`rotate(x) @ W.T + bias`; arguments as in [`reference.linear`]. Activations are multiplied as they are.

    8-bit activations are not faster on these devices, so every `activation_dtype` is served exactly.
    """
    if not _serves(x.device, x.dtype, scale.dtype, multiplier is not None):
        return blocked.linear(
            x,
            weight,
            scale,
            multiplier,
            bias,
            in_features=in_features,
            group_size=group_size,
            hadamard=hadamard,
        )
    out_features = weight.shape[0]
    step = min(max(16, BUFFER_ELEMENTS // in_features), out_features)
    buffer = _buffer(x.device, x.dtype, step * in_features)

    def rows(first: int, last: int) -> torch.Tensor:
        out = buffer[: (last - first) * in_features].view(last - first, in_features)
        part = None if multiplier is None else multiplier[first:last]
        _unpack(out, weight[first:last], scale[first:last], part, group_size)
        return out

    return blocked.multiply_rows(rotate(x, hadamard), rows, out_features, bias, BUFFER_ELEMENTS)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense weight `[N, K]`; arguments as in [`reference.dequantize`]."""
    if not _serves(weight.device, dtype, scale.dtype, multiplier is not None):
        return reference.dequantize(
            weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype
        )
    out = torch.empty(weight.shape[0], in_features, dtype=dtype, device=weight.device)
    if out.numel():
        _unpack(out, weight, scale, multiplier, group_size)
    return out


@functools.lru_cache(maxsize=8)
def _buffer_of(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(0, dtype=dtype, device=device)]


def _buffer(device: torch.device, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """Memory that every call uses again, as large as the largest so far: calls on this device run in order."""
    held = _buffer_of(device, dtype)
    if held[0].numel() < elements:
        held[0] = torch.empty(elements, dtype=dtype, device=device)
    return held[0]


def _unpack(
    out: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    group_size: int,
) -> None:
    rows, columns = out.shape
    width = weight.shape[1]
    shader = _shader(out.dtype, scale.dtype, multiplier is not None)
    shader.unpack(
        out,
        weight.contiguous(),
        scale.contiguous(),
        weight if multiplier is None else multiplier.contiguous(),  # not read without multipliers, but bound
        columns,
        width,
        group_size,
        group_count(columns, group_size),
        threads=rows * width,
        arg_casts=dict.fromkeys(range(4, 8), "int32"),
    )


@functools.lru_cache(maxsize=32)
def _shader(dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> Any:
    return torch.mps.compile_shader(metal_source(dtype, scale_dtype, double))


_trials = Trials("mps")


def _serves(device: torch.device, dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> bool:
    """Whether the kernel compiles and agrees with the reference; tried once for each kind."""
    if dtype not in METAL_TYPES or scale_dtype not in METAL_TYPES:
        return False

    def problem() -> str | None:
        generator = torch.Generator().manual_seed(0)
        rows, columns, group_size = 37, 203, 48
        width, groups = -(-columns // 4), group_count(columns, group_size)
        bits = torch.randint(0, 256, (rows, width), generator=generator)
        bits = bits & 0x55 | bits & (bits & 0x55) << 1  # 2 is not a code: the sign needs the bit below it
        packed = bits.to(torch.uint8).view(torch.int8)
        scale = (torch.rand(rows, 1 if double else groups, generator=generator) + 0.5).to(scale_dtype)
        multiplier = torch.randint(0, 64, (rows, groups), generator=generator).to(torch.uint8) if double else None
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        on_device = None if multiplier is None else multiplier.to(device)
        _unpack(out, packed.to(device), scale.to(device), on_device, group_size)
        options = {"in_features": columns, "group_size": group_size}
        expected = reference.dequantize(packed, scale, multiplier, dtype=torch.float32, **options)
        return problem_of(out.cpu().float(), expected, TOLERANCE[dtype])

    layout = "multipliers" if double else "group scales"
    return _trials.passes((dtype, scale_dtype, double), f"The Metal kernel ({dtype}, {layout})", problem)
