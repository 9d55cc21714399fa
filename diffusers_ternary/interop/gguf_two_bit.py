# SPDX-License-Identifier: Apache-2.0
"""Reads 2-bit types of GGUF: those that the `gguf` package cannot unpack (Q2_0, and Prism ML's PQ2_0 and PTQ1_0), and
TQ2_0, which it unpacks four times as slowly.

| type   | weights | block                                      | bits   |
|--------|---------|--------------------------------------------|--------|
| TQ2_0  | 256     | 64 bytes of four codes, float16 scale      | 2.0625 |
| Q2_0   | 64      | float16 scale, 16 bytes of four codes      | 2.25   |
| PQ2_0  | 128     | float16 scale, 32 bytes of four codes      | 2.125  |
| PTQ1_0 | 128     | 24 bytes of five trits, 2 of four, a scale | 1.75   |

It shares nothing with the writers of Q2_0 and TQ2_0 (`gguf_blocks.py`), so that reading back proves what was written.
"""

import numpy as np

from .compat import TwoBitType
from .slices import row_slices


# Weights of a PTQ1_0 block by the bytes that hold them: (first byte, bytes, trits in each), weight n * bytes + i in
# trit n of byte i.
_TRITS = ((0, 16, 5), (16, 8, 5), (24, 2, 4))


# Codes of a byte, the one in the lowest bits first.
_CODES = ((np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3).astype(np.float32) - 1


def dequantize_two_bit(data: np.ndarray, kind: TwoBitType) -> np.ndarray:
    """float32 weights `[rows, K]` of blocks, uint8 `[rows, bytes]`.

    Raises:
        ValueError: if a scale is not finite.
    """
    rows = row_slices((len(data), 4 * data.shape[1]))
    return np.concatenate([_dequantize(data[part], kind) for part in rows]) if rows[1:] else _dequantize(data, kind)


def dequantize_tq2_0(data: np.ndarray) -> np.ndarray:
    """As [`dequantize_two_bit`], of TQ2_0."""
    blocks = data.reshape(len(data), -1, 66)
    scales = _halves(blocks[..., 64:])
    halves = np.ascontiguousarray(blocks[..., :64]).reshape(len(data), -1, 2, 32)
    values = np.empty((*halves.shape[:3], 4, 32), dtype=np.float32)
    for place in range(4):
        values[..., place, :] = (halves >> 2 * place) & 3
    weights = values.reshape(*blocks.shape[:2], 256)
    weights -= 1
    weights *= scales
    return weights.reshape(len(data), -1)


def _dequantize(data: np.ndarray, kind: TwoBitType) -> np.ndarray:
    rows = data.shape[0]
    if kind is TwoBitType.PTQ1_0:
        blocks = data.reshape(rows, -1, 28)
        values, scales = _trits(blocks[..., :26]), _halves(blocks[..., 26:])
    else:
        size = 18 if kind is TwoBitType.Q2_0 else 34
        blocks = data.reshape(rows, -1, size)
        values = np.take(_CODES, blocks[..., 2:], axis=0).reshape(*blocks.shape[:2], -1)
        scales = _halves(blocks[..., :2])
    if not np.isfinite(scales).all():
        raise ValueError(f"a scale of {kind.name} is NaN or infinite")
    values *= scales
    return values.reshape(rows, -1)


def _halves(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _trits(data: np.ndarray) -> np.ndarray:
    parts = []
    for first, count, trits in _TRITS:
        part = data[..., None, first : first + count].astype(np.uint16)  # [rows, blocks, 1, bytes]
        powers = 3 ** np.arange(trits, dtype=np.uint16)[:, None]
        digit = ((part * powers & 0xFF) * 3) >> 8  # the top trit of what is left of the byte
        parts.append(digit.reshape(*digit.shape[:2], -1))
    return np.concatenate(parts, axis=-1).astype(np.float32) - 1
