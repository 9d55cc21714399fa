# SPDX-License-Identifier: Apache-2.0
"""2-bit K-plane packing, the layout in memory: four codes a byte, one byte column per plane of K.

A code is two's complement on two bits (00 = 0, 01 = +1, 11 = -1). Bits (7-2j, 6-2j) of byte c of a row hold the
code of column `c + j * KP`, with `KP = ceil(K / 4)`; columns past K are 0. The planes span the whole row, so no
block size of any kernel is baked into the layout, loads are contiguous and nothing is shuffled after decoding.
`(byte << 2j) & 0xC0` read as int8 is {0, 64, -64}, as float8_e4m3fn {0, 2, -2}, in the high byte of a 16-bit
float {0, 2, -2}: one code serves every activation dtype.
"""

import torch


PLANES = 4


def planes_width(in_features: int) -> int:
    """Bytes per row (KP) for `in_features` columns."""
    return -(-in_features // PLANES)


def pack_planes(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes into 2-bit K-planes.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`, values in {-1, 0, 1}.

    Returns:
        `torch.Tensor`: int8 `[N, ceil(K / 4)]`.
    """
    rows, columns = codes.shape
    width = planes_width(columns)
    packed = torch.zeros(rows, width, dtype=torch.uint8, device=codes.device)
    bits = codes.view(torch.uint8) if codes.is_contiguous() else codes.contiguous().view(torch.uint8)
    for j in range(PLANES):
        plane = bits[:, j * width : (j + 1) * width]
        packed[:, : plane.shape[1]] |= (plane & 3) << (6 - 2 * j)
    return packed.view(torch.int8)


def unpack_planes(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Inverse of [`pack_planes`].

    Args:
        packed (`torch.Tensor`): int8 `[N, ceil(K / 4)]`.
        in_features (`int`): K.

    Returns:
        `torch.Tensor`: int8 `[N, K]`, values in {-1, 0, 1}.
    """
    rows, width = packed.shape
    bits = packed.view(torch.uint8)
    codes = torch.empty(rows, PLANES, width, dtype=torch.int8, device=packed.device)
    for j in range(PLANES):
        # Shift left, then arithmetic shift right: the sign of the 2-bit code is extended for free.
        codes[:, j] = ((bits << (2 * j)) & 0xC0).view(torch.int8) >> 6
    return codes.view(rows, PLANES * width)[:, :in_features]
