# SPDX-License-Identifier: Apache-2.0
"""Writes ternary weights in the formats of others, element by element from their definitions, for tests of readers."""

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Codes int8 `[N, K]` and float16 scales `[N, G]` of groups of `group_size` columns."""

    codes: np.ndarray
    scales: np.ndarray
    group_size: int

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def dense(self) -> np.ndarray:
        """Float32 `[N, K]`."""
        spread = np.repeat(self.scales.astype(np.float32), self.group_size, axis=1)[:, : self.columns]
        return self.codes.astype(np.float32) * spread

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.dense()[start:stop]


def random_ternary(rows: int, columns: int, group_size: int, *, seed: int) -> Ternary:
    generator = np.random.default_rng(seed)
    codes = generator.integers(-1, 2, (rows, columns), dtype=np.int8)
    scales = generator.uniform(0.01, 0.2, (rows, -(-columns // group_size))).astype(np.float16)
    return Ternary(codes, scales, group_size)


def gemlite(weight: Ternary, *, mode: int, bits: int, bf16_scales: bool = False) -> dict[str, torch.Tensor]:
    """A gemlite 2-bit layer; `bits` is the width of the integers, `mode` its `W_group_mode` (1, 3 or 4)."""
    rows, columns = weight.codes.shape
    per_integer = bits // 2
    packed = np.zeros((columns // per_integer, rows), dtype=np.uint64)
    for k in range(columns):
        level = (weight.codes[:, k].astype(np.int64) + 1).astype(np.uint64)
        packed[k // per_integer] |= level << np.uint64(2 * (k % per_integer))
    signed = packed.astype({8: np.uint8, 16: np.uint16, 32: np.uint32}[bits])
    signed = signed if bits == 8 else signed.view({16: np.int16, 32: np.int32}[bits])
    scales = torch.from_numpy(weight.scales.T.copy())
    scales = scales.bfloat16() if bf16_scales else scales
    zeros = -scales if mode == 4 else torch.ones_like(scales) if mode == 3 else torch.tensor(1, dtype=torch.int32)
    channel = 1 if mode == 1 else 0
    # scaled_activations, W_nbits, group_size, unpack_mask, elements_per_sample, input, output, acc and meta dtypes,
    # channel_scale_mode, W_group_mode, data_contiguous
    metadata = [0, 2, weight.group_size, 3, per_integer, 1, 1, 0, 1, channel, mode, 1]
    return {
        "W_q": torch.from_numpy(signed),
        "scales": scales,
        "zeros": zeros,
        "metadata": torch.tensor(metadata, dtype=torch.int32),
        "orig_shape": torch.tensor([rows, columns], dtype=torch.int32),
        "meta_scale": torch.tensor(0.0),
    }


def hqq(weight: Ternary, *, zero: int = 1) -> dict[str, object]:
    """An HQQ 2-bit layer as `qmodel.pt` holds it: groups are the rows (axis 1), a byte has one of each quarter."""
    rows, columns = weight.codes.shape
    levels = (weight.codes + zero).astype(np.uint8)
    groups = levels.reshape(-1, weight.group_size)
    scale = weight.scales.reshape(-1, 1)
    quarter = groups.shape[0] // 4
    packed = np.zeros((quarter, groups.shape[1]), dtype=np.uint8)
    for index in range(4):
        packed |= groups[index * quarter : (index + 1) * quarter] << np.uint8(6 - 2 * index)
    return {
        "W_q": torch.from_numpy(packed),
        "scale": torch.from_numpy(scale.copy()),
        "zero": torch.full((len(scale), 1), float(zero), dtype=torch.float16),
        "nbits": 2,
        "group_size": weight.group_size,
        "shape": torch.Size([rows, columns]),
        "axis": 1,
        "packing": "2bit_u8",
        "unpack_view_dtype": torch.uint8,
        "view_as_float": False,
        "channel_wise": True,
    }


def hqq_for_safetensors(layer: dict[str, object]) -> dict[str, torch.Tensor]:
    """The settings as tensors: numbers, and strings as character codes."""
    encoded = {}
    for name, value in layer.items():
        if isinstance(value, torch.Tensor):
            encoded[name] = value
        elif isinstance(value, torch.Size):
            encoded[name] = torch.tensor(list(value))
        elif isinstance(value, (bool, int)):
            encoded[name] = torch.tensor(int(value), dtype=torch.int32)
        else:
            encoded[name] = torch.tensor([ord(character) for character in str(value)], dtype=torch.uint8)
    return encoded


def clark(name: str, weight: Ternary) -> dict[str, torch.Tensor]:
    """A layer of a Clark pack: four levels a byte, the first in the lowest bits."""
    rows, columns = weight.codes.shape
    packed = np.zeros((rows, columns // 4), dtype=np.uint8)
    for k in range(columns):
        packed[:, k // 4] |= ((weight.codes[:, k] + 1).astype(np.uint8)) << np.uint8(2 * (k % 4))
    return {
        f"{name}::codes2b": torch.from_numpy(packed),
        f"{name}::scale": torch.from_numpy(weight.scales.copy()),
        f"{name}::shape": torch.tensor([rows, columns]),
    }


def tq2_0(weight: Ternary) -> np.ndarray:
    """GGML's TQ2_0: per block of 256, for each half of 128, 32 bytes with four levels each (element l + 32 j in bits
    2 j of byte l), then the float16 scale.
    """
    assert weight.group_size % 256 == 0
    rows, columns = weight.codes.shape
    blocks = []
    for row in range(rows):
        for start in range(0, columns, 256):
            levels = weight.codes[row, start : start + 256] + 1
            data = bytearray(64)
            for half in range(2):
                for j in range(4):
                    for lane in range(32):
                        data[32 * half + lane] |= int(levels[128 * half + 32 * j + lane]) << (2 * j)
            blocks.append(bytes(data) + weight.scales[row, start // weight.group_size].tobytes())
    return np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(rows, -1)


def tq1_0(weight: Ternary) -> np.ndarray:
    """GGML's TQ1_0: 48 bytes of five levels in base 3 (32 + 16 lanes), 4 bytes of four levels, the float16 scale.

    A byte holds ceil(value * 256 / 243), so that multiplying by 3 brings the levels out one by one.
    """
    assert weight.group_size % 256 == 0
    rows, columns = weight.codes.shape
    blocks = []
    for row in range(rows):
        for start in range(0, columns, 256):
            levels = weight.codes[row, start : start + 256].astype(int) + 1
            data = bytearray()
            for first, lanes, digits in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
                for lane in range(lanes):
                    value = 0
                    for digit in range(5):
                        value = 3 * value + (int(levels[first + lanes * digit + lane]) if digit < digits else 0)
                    data.append((value * 256 + 242) // 243)
            blocks.append(bytes(data) + weight.scales[row, start // weight.group_size].tobytes())
    return np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(rows, -1)
