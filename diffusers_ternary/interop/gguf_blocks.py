# SPDX-License-Identifier: Apache-2.0
"""Which GGML type holds a packed weight without loss, and its blocks.

| type  | weights per block | bits per weight | holds                                        |
|-------|-------------------|-----------------|----------------------------------------------|
| TQ1_0 | 256               | 1.6875          | ternary, one float16 scale per block         |
| TQ2_0 | 256               | 2.0625          | the same, faster to unpack                   |
| Q4_0  | 32                | 4.5             | -8 ... 7, one float16 scale: ternary as well |
| Q8_0  | 32                | 8.5             | int8, one float16 scale                      |

A block must lie inside one group. Q4_0 is the narrowest type with blocks of 32, so it takes the group sizes that TQ
cannot.
"""

import dataclasses

import numpy as np
import torch

from ..format import Int8Spec, LayerSpec, TernarySpec


TERNARY_TYPES = ("tq2_0", "tq1_0")
FALLBACKS = ("f32", "f16", "q8_0")
_TQ_BLOCK, _Q_BLOCK = 256, 32


@dataclasses.dataclass(frozen=True)
class BlockChoice:
    """The GGML type that holds a layer exactly, or why none does."""

    type: str | None
    reason: str = ""


def choose_type(spec: LayerSpec, scales: torch.Tensor, ternary_type: str) -> BlockChoice:
    """The smallest type that holds a packed layer without loss.

    Args:
        spec ([`LayerSpec`]): of the layer.
        scales (`torch.Tensor`): its effective float32 scales `[N, G]`.
        ternary_type (`str`): `"tq2_0"` or `"tq1_0"`.
    """
    if isinstance(spec, TernarySpec) and (spec.hadamard or spec.rank):
        return BlockChoice(None, "its inputs are rotated" if spec.hadamard else "it has a low-rank correction")
    if not torch.equal(scales.half().float(), scales):
        return BlockChoice(None, "its scales are no 16-bit floats (6-bit multipliers, or bfloat16 out of range)")
    columns = spec.in_features
    if isinstance(spec, Int8Spec):
        return BlockChoice("q8_0") if columns % _Q_BLOCK == 0 else BlockChoice(None, _no_blocks(columns, _Q_BLOCK))
    whole_row = spec.groups == 1
    if columns % _TQ_BLOCK == 0 and (whole_row or spec.group_size % _TQ_BLOCK == 0):
        return BlockChoice(ternary_type)
    if columns % _Q_BLOCK:
        return BlockChoice(None, _no_blocks(columns, _Q_BLOCK))
    if whole_row or spec.group_size % _Q_BLOCK == 0:
        return BlockChoice("q4_0")
    return BlockChoice(None, f"its group size {spec.group_size} is not a multiple of {_Q_BLOCK}")


def _no_blocks(columns: int, block: int) -> str:
    return f"its {columns} input features are not a multiple of {block}"


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
    levels = (codes + 8).to(torch.uint8).view(rows, columns // _Q_BLOCK, 2, _Q_BLOCK // 2)
    nibbles = levels[:, :, 0] | (levels[:, :, 1] << 4)
    return _with_scales(nibbles, scales)


def encode_q8_0(values: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Q8_0 blocks of int8 values (same arguments as [`encode_q4_0`]): a float16 scale, then 32 bytes."""
    rows, columns = values.shape
    return _with_scales(values.view(rows, columns // _Q_BLOCK, _Q_BLOCK).view(torch.uint8), scales)


def block_scales(scales: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """Scales `[N, G]` of groups repeated for their blocks of 32, `[N, K / 32]`."""
    blocks = columns // _Q_BLOCK
    if scales.shape[1] == 1:
        return scales.expand(-1, blocks)
    return scales.repeat_interleave(group_size // _Q_BLOCK, dim=1)[:, :blocks]


def _with_scales(data: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    rows = data.shape[0]
    halves = scales.contiguous().half().view(torch.uint8).view(rows, -1, 2)
    return torch.cat([halves, data], dim=-1).reshape(rows, -1).numpy()
