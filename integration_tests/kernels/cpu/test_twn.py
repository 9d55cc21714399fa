# SPDX-License-Identifier: Apache-2.0
"""Rounding in C against the rule in torch, in float64."""

import random

import pytest
import torch

from diffusers_ternary.format import group_count, pack_planes, planes_width, unpack_planes
from diffusers_ternary.kernels.cpu import native
from diffusers_ternary.kernels.cpu import twn as native_twn
from diffusers_ternary.ternarize import FUSED_ROUNDINGS, ternarize, twn


pytestmark = pytest.mark.skipif(not native.variants(), reason="the package was installed without its compiled library")


def by_torch(weight, group_size):
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    counts = torch.full((groups,), float(group_size))
    counts[-1] = columns - (groups - 1) * group_size
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    result = twn(padded, counts)
    return pack_planes(result.codes.view(rows, -1)[:, :columns]), result.scales


def twn_planes(weight, group_size):
    """Planes and scales of the library, or `None` where torch must serve."""
    rows, columns = weight.shape
    planes = torch.empty(rows, planes_width(columns), dtype=torch.int8)
    scales = torch.empty(rows, group_count(columns, group_size))
    return (planes, scales) if native_twn.twn_planes(weight, group_size, planes, scales) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_planes_and_scales_are_those_of_torch(dtype):
    seed = random.randrange(10**6)
    print(f"{seed=}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        rows, columns = rng.choice([1, 3, 40, 257]), rng.choice([1, 5, 16, 31, 130, 515, 1152])
        group_size = min(columns, rng.choice([1, 7, 16, 32, 100, 128, 5000]))
        weight = (torch.randn(rows, columns) * rng.choice([1e-3, 1.0, 30.0])).to(dtype)
        weight[rng.randrange(rows)] = 0
        planes, scales = twn_planes(weight, group_size)
        expected, expected_scales = by_torch(weight, group_size)
        assert torch.equal(planes, expected), (rows, columns, group_size)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)


def test_sums_lose_nothing():
    # a float32 sum over a million columns would lose the small weights beside the large ones
    weight = torch.full((1, 1 << 20), 1e-3)
    weight[0, 0] = 3e4
    planes, scales = twn_planes(weight, weight.shape[1])
    delta = 0.75 * float(weight.double().abs().mean())
    codes = unpack_planes(planes, weight.shape[1])
    assert torch.equal(codes, (weight.double() > delta).to(torch.int8))
    assert scales.item() == 3e4


def test_views_threads_and_ties():
    torch.manual_seed(0)
    wide = torch.randn(600, 900)
    view = wide[:, 100:740]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        planes, scales = twn_planes(view, 128)
    finally:
        torch.set_num_threads(before)
    expected, expected_scales = by_torch(view, 128)
    assert torch.equal(planes, expected)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # what equals the threshold is 0
    planes, scales = twn_planes(torch.tensor([[3.0, -3.0, 0.0, 0.0, 1.125, -1.125, 0.75, 0.0]]), 8)
    assert unpack_planes(planes, 8).tolist() == [[1, -1, 0, 0, 1, -1, 0, 0]]
    assert scales.item() == 2.0625


def test_what_torch_serves():
    assert twn_planes(torch.randn(4, 8).double(), 8) is None
    assert twn_planes(torch.randn(8, 4).T, 8) is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(40, 64)
        weight[17, 33] = bad
        assert twn_planes(weight, 32) is None
        with pytest.raises(ValueError, match="layer7: the weight holds 1 NaN or Inf of 2560 values"):
            ternarize(weight, group_size=32, name="layer7")


@pytest.mark.parametrize("scales", ["group", "double"])
def test_ternarize_takes_it(monkeypatch, scales):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(70, 515).bfloat16())
    fused = ternarize(weight, group_size=64, scales=scales, rank=2)
    monkeypatch.delitem(FUSED_ROUNDINGS, ("twn", "cpu"))
    plain = ternarize(weight, group_size=64, scales=scales, rank=2)
    assert torch.equal(fused.packed, plain.packed)
    torch.testing.assert_close(fused.dequantize(), plain.dequantize(), rtol=2e-3, atol=1e-4)
