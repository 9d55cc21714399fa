# SPDX-License-Identifier: Apache-2.0
"""Reads the 2-bit types of GGUF that the `gguf` package cannot unpack: Q2_0, and Prism ML's PQ2_0 and PTQ1_0.

| type   | weights | block                                      | bits   |
|--------|---------|--------------------------------------------|--------|
| Q2_0   | 64      | float16 scale, 16 bytes of four codes      | 2.25   |
| PQ2_0  | 128     | float16 scale, 32 bytes of four codes      | 2.125  |
| PTQ1_0 | 128     | 24 bytes of five trits, 2 of four, a scale | 1.75   |

It shares nothing with the writer of Q2_0 (`gguf_blocks.py`), so that reading back proves what was written.
"""

import numpy as np

from .compat import TwoBitType


# Weights of a PTQ1_0 block by the bytes that hold them: (first byte, bytes, trits in each), weight n * bytes + i in
# trit n of byte i.
_TRITS = ((0, 16, 5), (16, 8, 5), (24, 2, 4))


def dequantize_two_bit(data: np.ndarray, kind: TwoBitType) -> np.ndarray:
    """float32 weights `[rows, K]` of blocks, uint8 `[rows, bytes]`.

    Raises:
        ValueError: if a scale is not finite.
    """
    rows = data.shape[0]
    if kind is TwoBitType.PTQ1_0:
        blocks = data.reshape(rows, -1, 28)
        values, scales = _trits(blocks[..., :26]), _halves(blocks[..., 26:])
    else:
        size = 18 if kind is TwoBitType.Q2_0 else 34
        blocks = data.reshape(rows, -1, size)
        codes = blocks[..., 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3  # [rows, blocks, bytes, 4]
        values, scales = codes.reshape(*blocks.shape[:2], -1).astype(np.float32) - 1, _halves(blocks[..., :2])
    if not np.isfinite(scales).all():
        raise ValueError(f"a scale of {kind.name} is NaN or infinite")
    return (values * scales).reshape(rows, -1)


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
