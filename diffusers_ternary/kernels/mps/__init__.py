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
from ..operands import PackedWeight
from ..triton.trial import TOLERANCE, Trials, problem_of
from .shader import METAL_TYPES, metal_source


__all__ = ["dequantize", "linear"]

logger = logging.getLogger(__name__)

# Elements of the buffer: 32 MB in 16 bits, and large enough products to keep the GPU busy.
BUFFER_ELEMENTS = 1 << 24


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str = "none"
) -> torch.Tensor:
    """`rotate(x) @ W.T + bias`; arguments as in [`reference.linear`]. Activations are multiplied as they are.

    8-bit activations are not faster on these devices, so every `activation_dtype` is served exactly.
    """
    if not _serves(x.device, x.dtype, weight):
        return blocked.linear(x, weight, bias)
    out_features, in_features = weight.out_features, weight.in_features
    step = min(max(16, BUFFER_ELEMENTS // in_features), out_features)
    buffer = _buffer(x.device, x.dtype, step * in_features)

    def part(first: int, last: int) -> torch.Tensor:
        out = buffer[: (last - first) * in_features].view(last - first, in_features)
        _unpack(out, weight.part(first, last))
        return out

    return blocked.multiply_parts(rotate(x, weight.hadamard), part, out_features, bias, BUFFER_ELEMENTS)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[`reference.dequantize`]."""
    device = weight.packed.device
    if not _serves(device, dtype, weight):
        return reference.dequantize(weight, dtype)
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=device)
    if out.numel():
        _unpack(out, weight)
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


def _unpack(out: torch.Tensor, weight: PackedWeight) -> None:
    weight = weight.contiguous()
    shader = _shader(out.dtype, weight.scale.dtype, weight.multiplier is not None)
    shader.unpack(
        out,
        weight.packed,
        weight.scale,
        weight.packed if weight.multiplier is None else weight.multiplier,  # not read without multipliers, but bound
        weight.in_features,
        weight.plane_width,
        weight.group_size,
        weight.groups,
        threads=weight.out_features * weight.plane_width,
        arg_casts=dict.fromkeys(range(4, 8), "int32"),
    )


@functools.lru_cache(maxsize=32)
def _shader(dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> Any:
    return torch.mps.compile_shader(metal_source(dtype, scale_dtype, double))


_trials = Trials("mps")


def _serves(device: torch.device, dtype: torch.dtype, weight: PackedWeight) -> bool:
    """Whether the kernel compiles and agrees with the reference; tried once for each kind."""
    scale_dtype, double = weight.scale.dtype, weight.multiplier is not None
    if dtype not in METAL_TYPES or scale_dtype not in METAL_TYPES:
        return False

    def problem() -> str | None:
        generator = torch.Generator().manual_seed(0)
        out_features, in_features, group_size = 37, 203, 48
        width, groups = -(-in_features // 4), group_count(in_features, group_size)
        bits = torch.randint(0, 256, (out_features, width), generator=generator)
        bits = bits & 0x55 | bits & (bits & 0x55) << 1  # 2 is not a code: the sign needs the bit below it
        packed = bits.to(torch.uint8).view(torch.int8)
        scale = (torch.rand(out_features, 1 if double else groups, generator=generator) + 0.5).to(scale_dtype)
        multiplier = torch.randint(0, 64, (out_features, groups), generator=generator).to(torch.uint8)
        sample = PackedWeight(packed, scale, multiplier if double else None, in_features, group_size)
        out = torch.empty(out_features, in_features, dtype=dtype, device=device)
        _unpack(out, sample.to(device))
        return problem_of(out.cpu().float(), reference.dequantize(sample, torch.float32), TOLERANCE[dtype])

    layout = "multipliers" if double else "group scales"
    return _trials.passes((dtype, scale_dtype, double), f"The Metal kernel ({dtype}, {layout})", problem)
