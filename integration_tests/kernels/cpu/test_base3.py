# SPDX-License-Identifier: Apache-2.0
"""The library's conversions between files and memory against those of `format`, bit by bit."""

import pytest
import torch

from diffusers_ternary.format import pack_base3, pack_planes
from diffusers_ternary.kernels.cpu.base3 import base3_to_planes, planes_to_base3
from diffusers_ternary.kernels.cpu.native import open_library


SHAPES = [(1, 1), (1, 2), (5, 1), (3, 4), (1, 7), (2, 5), (7, 13), (4, 243), (31, 16), (33, 267), (2, 1000)]
native = pytest.mark.skipif(isinstance(open_library(), str), reason="no compiled library here")


def random_codes(shape, seed):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions(shape, seed):
    codes = random_codes(shape, seed)
    packed, planes = pack_base3(codes), pack_planes(codes)
    assert torch.equal(base3_to_planes(packed, *shape), planes)
    assert torch.equal(planes_to_base3(planes, shape[1]), packed)


@pytest.mark.parametrize("strided", [False, True])
def test_without_the_library(strided, monkeypatch):
    if not strided:
        monkeypatch.setattr("diffusers_ternary.kernels.cpu.base3.open_library", lambda: "not installed")
    codes = random_codes((33, 267), 2)
    packed, planes = pack_base3(codes), pack_planes(codes)
    if strided:  # what is not contiguous goes through torch
        packed, planes = packed.repeat_interleave(2)[::2], planes.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(base3_to_planes(packed, 33, 267), pack_planes(codes))
    assert torch.equal(planes_to_base3(planes, 267), pack_base3(codes))


def test_wrong_size():
    with pytest.raises(ValueError, match=r"must be uint8 \[18\], got uint8 \[17\]"):
        base3_to_planes(torch.zeros(17, dtype=torch.uint8), 3, 29)


@native
@pytest.mark.parametrize("shape", [(7, 13), (10, 267)])
def test_parts_of_the_rows(shape):
    """Rows from a multiple of five on can be converted on their own: threads may share a layer."""
    functions = open_library()
    codes = random_codes(shape, 3)
    packed, planes = pack_base3(codes), pack_planes(codes)
    out, back = torch.empty_like(planes), torch.zeros_like(packed)
    for first, last in ((0, 5), (5, shape[0])):
        assert functions.dt_base3_to_planes(packed.data_ptr(), first, last, shape[1], out.data_ptr()) == 0
        assert functions.dt_planes_to_base3(planes.data_ptr(), first, last, shape[1], back.data_ptr()) == 0
    assert torch.equal(out, planes)
    assert torch.equal(back, packed)
