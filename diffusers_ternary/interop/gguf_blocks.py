# SPDX-License-Identifier: Apache-2.0
"""Which GGML type holds a packed weight without loss, and its blocks.

| type  | weights per block | bits per weight | holds                                        |
|-------|-------------------|-----------------|----------------------------------------------|
| TQ1_0 | 256               | 1.6875          | ternary, one float16 scale per block         |
| TQ2_0 | 256               | 2.0625          | the same, faster to unpack                   |
| Q2_0  | 64                | 2.25            | -1, 0, 1, 2, one float16 scale               |
| Q4_0  | 32                | 4.5             | -8 ... 7, one float16 scale: ternary as well |
| Q8_0  | 32                | 8.5             | int8, one float16 scale                      |

A block must lie inside one group. Which types a program reads, and on which device it is fast:

| program                  | types              | why                                                  |
|--------------------------|--------------------|------------------------------------------------------|
| stable-diffusion.cpp CPU | TQ2_0, Q2_0, Q4_0  | TQ2_0 is its fastest; it reads Q2_0 since 12 Aug 2026 |
| stable-diffusion.cpp GPU | Q2_0, Q4_0         | it has no GPU kernels for TQ                         |
| ComfyUI-GGUF             | Q4_0               | unpacks TQ on the CPU, in each step; no Q2_0         |
| diffusers                | Q4_0               | knows neither TQ nor Q2_0                            |
"""

import dataclasses

import numpy as np
import torch

from ..format import Int8Spec, LayerSpec, TernarySpec
from .export import MERGE, ONLY_CODES, four_in_a_byte, more_than_codes


TERNARY_TYPES = ("tq2_0", "tq1_0", "q2_0", "q4_0")
FALLBACKS = ("f32", "f16", "q8_0")
# The types to try for a program, the best first. Where a layer fits none of them, it cannot be exported.
RUNTIMES = {
    "sdcpp-cpu": ("tq2_0", "q2_0", "q4_0"),
    "sdcpp-gpu": ("q2_0", "q4_0"),
    "comfyui": ("q4_0",),
    "diffusers": ("q4_0",),
}
BLOCK = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "q4_0": 32, "q8_0": 32}
BLOCK_BYTES = {"tq2_0": 66, "tq1_0": 54, "q2_0": 18, "q4_0": 18, "q8_0": 34}
_INT8_TYPE = "q8_0"
_FOUR_ZEROS = 0b01010101
_NOT_FLOAT16 = (
    "its scales are not 16-bit floats (6-bit multipliers, or bfloat16 out of range). Make the model with "
    "scale_layout='portable' or scale_layout='group', or round them to float16 (--round-scales, at most 0.05 %)."
)


@dataclasses.dataclass(frozen=True)
class BlockChoice:
    """The GGML type that holds a layer exactly, or why none does and what helps."""

    type: str | None
    reason: str = ""


def choose_type(spec: LayerSpec, scales: torch.Tensor, types: tuple[str, ...]) -> BlockChoice:
    """The first type that holds a packed layer without loss.

    Args:
        spec ([`LayerSpec`]): of the layer.
        scales (`torch.Tensor`): its effective float32 scales `[N, G]`.
        types (`tuple[str, ...]`): of `TERNARY_TYPES`, the best first.
    """
    reason = more_than_codes(spec)
    if reason:
        return BlockChoice(None, f"{reason}. {ONLY_CODES}")
    if not torch.equal(scales.half().float(), scales):
        return BlockChoice(None, _NOT_FLOAT16)
    for kind in (_INT8_TYPE,) if isinstance(spec, Int8Spec) else types:
        reason = _why_not(spec, BLOCK[kind])
        if not reason:
            return BlockChoice(kind)
    return BlockChoice(None, reason)


def _why_not(spec: LayerSpec, block: int) -> str:
    """Why blocks do not lie inside the groups of a layer; empty if they do."""
    if spec.in_features % block:
        return (
            f"its {spec.in_features} input features are not a multiple of {block}. Name the layer in "
            f"modules_to_not_convert, or {MERGE}."
        )
    if isinstance(spec, TernarySpec) and spec.groups > 1 and spec.group_size % block:
        return (
            f"its group size {spec.group_size} is not a multiple of {block}. Make the model with such a group size "
            f"(256 for TQ2_0, 64 for Q2_0), or {MERGE}."
        )
    return ""


def encode_q2_0(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Q2_0 blocks of ternary codes: a float16 scale, then 16 bytes of four weights, the first in the lowest bits.

    The value of a pair of bits q is (q - 1) * scale. A block of zeros has the scale 0, as GGML's quantizer writes it.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`.
        scales (`torch.Tensor`): float32 `[N, K / 64]`, one per block.

    Returns:
        `np.ndarray`: uint8 `[N, K / 64 * 18]`.
    """
    rows, columns = codes.shape
    data = four_in_a_byte(codes).view(rows, columns // BLOCK["q2_0"], -1)
    return _with_scales(data, scales * (data != _FOUR_ZEROS).any(dim=-1))


def encode_tq2_0(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """TQ2_0 blocks of ternary codes: 64 bytes of four weights, then a float16 scale, which is 0 for a block of zeros.

    A half of the block is 32 bytes; weight 32 n + i of it is in the bits from 2 n on of byte i, as (q - 1) * scale.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`.
        scales (`torch.Tensor`): float32 `[N, K / 256]`, one per block.

    Returns:
        `np.ndarray`: uint8 `[N, K / 256 * 66]`.
    """
    rows, columns = codes.shape
    quarters = (codes + 1).view(torch.uint8).view(rows, columns // BLOCK["tq2_0"], 2, 4, 32)
    data = quarters[..., 0, :].clone()
    for place in (1, 2, 3):
        data |= quarters[..., place, :] << (2 * place)
    data = data.view(rows, -1, 64)
    return _with_scales(data, scales * (data != _FOUR_ZEROS).any(dim=-1), last=True)


def encode_q4_0(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Q4_0 blocks of ternary codes: a float16 scale, then 16 bytes; low nibbles are the first half of the block.

    The value of a nibble q is (q - 8) * scale.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`.
        scales (`torch.Tensor`): float32 `[N, K / 32]`, one per block.

    Returns:
        `np.ndarray`: uint8 `[N, K / 32 * 18]`.
    """
    rows, columns = codes.shape
    block = BLOCK["q4_0"]
    levels = (codes + 8).to(torch.uint8).view(rows, columns // block, 2, block // 2)
    nibbles = levels[:, :, 0] | (levels[:, :, 1] << 4)
    return _with_scales(nibbles, scales)


def encode_q8_0(values: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Q8_0 blocks of int8 values (same arguments as [`encode_q4_0`]): a float16 scale, then 32 bytes."""
    rows, columns = values.shape
    block = BLOCK["q8_0"]
    return _with_scales(values.view(rows, columns // block, block).view(torch.uint8), scales)


ENCODERS = {"tq2_0": encode_tq2_0, "q2_0": encode_q2_0, "q4_0": encode_q4_0, "q8_0": encode_q8_0}


def _with_scales(data: torch.Tensor, scales: torch.Tensor, *, last: bool = False) -> np.ndarray:
    rows = data.shape[0]
    halves = scales.contiguous().half().view(torch.uint8).view(rows, -1, 2)
    return torch.cat([data, halves] if last else [halves, data], dim=-1).reshape(rows, -1).numpy()
