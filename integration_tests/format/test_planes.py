# SPDX-License-Identifier: Apache-2.0
"""2-bit planes against an independent reader in plain Python, and against bytes that never change."""

import pytest
import torch

from diffusers_ternary.format import pack_planes, planes_width, unpack_planes


# Two rows of ten codes (KP = 3) and their bytes, computed by hand from FORMAT.md.
GOLDEN_CODES = [[1, -1, 0, 0, 1, -1, -1, 0, 1, 1], [-1] * 10]
GOLDEN_BYTES = [[0x4D, 0xD0, 0x34], [0xFF, 0xFC, 0xFC]]

BITS = {0b00: 0, 0b01: 1, 0b11: -1}


def read_planes(packed: torch.Tensor, columns: int) -> list[list[int]]:
    """What FORMAT.md says, one code at a time; also checks that the padding is code 0."""
    rows = []
    width = -(-columns // 4)
    for row in packed.tolist():
        codes = [BITS[((row[k % width] & 0xFF) >> (6 - 2 * (k // width))) & 3] for k in range(4 * width)]
        assert not any(codes[columns:])
        rows.append(codes[:columns])
    return rows


def test_golden_bytes():
    codes = torch.tensor(GOLDEN_CODES, dtype=torch.int8)
    packed = pack_planes(codes)
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == GOLDEN_BYTES
    assert torch.equal(unpack_planes(packed, 10), codes)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 8, 31, 32, 33, 34, 127, 128])
def test_every_tail_against_the_plain_reader(columns, seed):
    codes = torch.randint(-1, 2, (3, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_planes(codes)
    assert packed.shape == (3, planes_width(columns))
    assert read_planes(packed, columns) == codes.tolist()
    assert torch.equal(unpack_planes(packed, columns), codes)


def test_all_81_valid_bytes():
    digits = torch.tensor([-1, 0, 1], dtype=torch.int8)
    codes = torch.cartesian_prod(digits, digits, digits, digits)  # [81, 4]: one byte a row
    packed = pack_planes(codes)
    assert packed.shape == (81, 1)
    assert len(set(packed.flatten().tolist())) == 81
    assert torch.equal(unpack_planes(packed, 4), codes)


def test_one_code_serves_every_activation_dtype():
    # The property that the kernels rely on: the top two bits, seen as each dtype, are a multiple of the code.
    codes = torch.randint(-1, 2, (4, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    bits = pack_planes(codes).view(torch.uint8)
    planes = torch.cat([(bits << (2 * j)) & 0xC0 for j in range(4)], dim=1)
    assert torch.equal(planes.view(torch.int8), codes * 64)
    assert torch.equal(planes.view(torch.float8_e4m3fn).float(), codes * 2.0)
    high = planes.to(torch.int32) << 8
    assert torch.equal(high.to(torch.int16).view(torch.float16).float(), codes * 2.0)
    assert torch.equal(high.to(torch.int16).view(torch.bfloat16).float(), codes * 2.0)


def test_codes_that_are_not_contiguous():
    codes = torch.randint(-1, 2, (10, 6), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_planes(pack_planes(codes.T), 10), codes.T)
