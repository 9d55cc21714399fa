# SPDX-License-Identifier: Apache-2.0
"""Base-3 packing against an independent reader in plain Python, and against bytes that never change."""

import pytest
import torch

from diffusers_ternary.format import base3, pack_base3, packed_base3_bytes, unpack_base3


# 23 codes and their bytes, computed by hand from FORMAT.md; a change of the format fails here.
GOLDEN_CODES = [1, -1, 0, 0, 1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, -1]
GOLDEN_BYTES = bytes.fromhex("c800f27971")


def read_base3(data: bytes, count: int) -> list[int]:
    """What FORMAT.md says, one digit at a time."""
    codes = []
    for byte in data:
        assert byte < 243
        for _ in range(5):
            byte, digit = divmod(byte, 3)
            codes.append(digit - 1)
    assert all(code == 0 for code in codes[count:]), "the tail of the last byte is code 0"
    return codes[:count]


def test_golden_bytes():
    codes = torch.tensor(GOLDEN_CODES, dtype=torch.int8)
    assert bytes(pack_base3(codes).tolist()) == GOLDEN_BYTES
    packed = torch.tensor(list(GOLDEN_BYTES), dtype=torch.uint8)
    assert unpack_base3(packed, (23,)).tolist() == GOLDEN_CODES


def test_all_243_bytes():
    packed = torch.arange(243, dtype=torch.uint8)
    codes = unpack_base3(packed, (243 * 5,))
    assert codes.tolist() == read_base3(bytes(range(243)), 243 * 5)
    assert torch.equal(pack_base3(codes), packed)
    assert len({tuple(row) for row in codes.view(243, 5).tolist()}) == 243


@pytest.mark.parametrize("value", range(243, 256))
def test_a_byte_that_no_trits_give_is_refused(value):
    packed = torch.tensor([0, 7, value], dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"Code byte {value} at offset 2.*below 243.*download"):
        unpack_base3(packed, (3, 5))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (3, 7), (5, 5), (4, 127), (7, 128), (9, 131), (64, 96)]
)
def test_every_tail_against_the_plain_reader(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    packed = pack_base3(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.numel() // 5),) == (packed_base3_bytes(codes.numel()),)
    assert read_base3(bytes(packed.tolist()), codes.numel()) == codes.flatten().tolist()
    assert torch.equal(unpack_base3(packed, shape), codes)


def test_layers_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(base3, "_CHUNK_BYTES", 3)
    codes = torch.randint(-1, 2, (7, 11), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_base3(codes)
    assert read_base3(bytes(packed.tolist()), 77) == codes.flatten().tolist()
    assert torch.equal(unpack_base3(packed, (7, 11)), codes)


def test_codes_that_are_not_contiguous_are_read_in_row_major_order():
    codes = torch.randint(-1, 2, (6, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(unpack_base3(pack_base3(codes), (10, 6)), codes)


def test_nothing_packs_to_nothing():
    assert pack_base3(torch.empty(0, 5, dtype=torch.int8)).numel() == 0
    assert unpack_base3(torch.empty(0, dtype=torch.uint8), (0, 5)).shape == (0, 5)


@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_codes_outside_the_alphabet_are_refused(bad):
    with pytest.raises(ValueError, match="must be -1, 0 or 1"):
        pack_base3(torch.tensor([0, bad, 1], dtype=torch.int8))


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(1, 2, dtype=torch.uint8),
    ],
    ids=["too long", "too short", "wrong dtype", "wrong rank"],
)
def test_sizes_and_dtypes_that_do_not_fit_are_refused(packed):
    with pytest.raises(ValueError, match=r"Packed codes of a \[2, 5\] weight must be uint8 \[2\]"):
        unpack_base3(packed, (2, 5))
