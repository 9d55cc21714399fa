# SPDX-License-Identifier: Apache-2.0
"""LSQ's gradients against its formulas written out, and stored scales against what a file gives back."""

import math

import pytest
import torch

from diffusers_ternary.distillation.fake_quantize import (
    consistent_latent,
    fake_quantize,
    round_scales,
    round_to,
    stored_scales,
    ternary_codes,
)
from diffusers_ternary.format import group_scales


SHAPES = [(3, 8, 4), (2, 7, 3), (1, 5, 5), (4, 9, 1), (2, 6, 128)]


def make(rows, columns, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(columns / group_size)
    latent = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.2
    return latent, scales, torch.randn(rows, columns, generator=generator)


def by_hand(latent, scales, grad, group_size):
    """w_hat, dL/dw and dL/ds, element by element."""
    rows, columns = latent.shape
    out, d_latent, d_scales = torch.zeros_like(latent), torch.zeros_like(latent), torch.zeros_like(scales)
    for n in range(rows):
        for k in range(columns):
            s, w, g = float(scales[n, k // group_size]), float(latent[n, k]), float(grad[n, k])
            if s == 0:
                continue
            code = min(1, max(-1, round(w / s)))  # Python rounds half to even, as torch does
            inside = abs(w / s) <= 1
            out[n, k] = s * code
            d_latent[n, k] = g if inside else 0
            d_scales[n, k // group_size] += g * (code - (w / s if inside else 0))
    return out, d_latent, d_scales


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, seed):
    rows, columns, group_size = shape
    group_size = min(group_size, columns)
    latent, scales, grad = make(rows, columns, group_size, seed)
    latent.requires_grad_()
    scales.requires_grad_()
    result = fake_quantize(latent, scales, group_size)
    result.backward(grad)
    expected = by_hand(latent.detach(), scales.detach(), grad, group_size)
    torch.testing.assert_close(result.detach(), expected[0])
    torch.testing.assert_close(latent.grad, expected[1])
    torch.testing.assert_close(scales.grad, expected[2])


def test_a_group_of_scale_zero_stays_zero_and_takes_no_gradient():
    latent = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    scales = torch.tensor([[0.0, 0.6]], requires_grad=True)
    result = fake_quantize(latent, round_scales(scales, layout="group", dtype=torch.float16), 2)
    result.sum().backward()
    assert result[0, :2].tolist() == [0.0, 0.0]
    assert scales.grad is not None
    assert torch.isfinite(scales.grad).all()
    assert float(round_scales(scales.detach(), layout="double", dtype=torch.float16)[0, 0]) == 0.0


@pytest.mark.parametrize("layout", ["group", "double"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_rounded_scales_are_the_stored_ones(layout, dtype, seed):
    scales = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) + 1e-3
    scales.requires_grad_()
    rounded = round_scales(scales, layout=layout, dtype=dtype)
    stored = stored_scales(scales.detach(), layout=layout, dtype=dtype)
    assert stored[0].dtype == dtype
    assert torch.equal(rounded, group_scales(*stored))
    assert rounded.detach().sub(scales.detach()).abs().max() <= scales.detach().max() * (2**-8 + 1 / 126)
    rounded.backward(torch.full_like(rounded, 3.0))
    assert torch.equal(scales.grad, torch.full_like(scales, 3.0))


def test_scales_stay_positive_and_in_range():
    scales = torch.tensor([[-0.1, 1e-9, 1e9]])
    rounded = round_scales(scales, layout="group", dtype=torch.float16)
    limits = torch.finfo(torch.float16)
    assert rounded.tolist() == [[limits.smallest_normal, limits.smallest_normal, limits.max]]


def test_round_to_is_straight_through():
    values = torch.tensor([1.0001, 70000.0], requires_grad=True)
    rounded = round_to(values, torch.float16)
    rounded.sum().backward()
    assert rounded.tolist() == [1.0, 65504.0]
    assert values.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_consistent_with_any_codes(shape, seed, margin):
    rows, columns, group_size = shape
    group_size = min(group_size, columns)
    weight, scales, _ = make(rows, columns, group_size, seed)
    scales[0, 0] = 0
    codes = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.int8)
    codes[0, :group_size] = 0
    latent = consistent_latent(weight, codes, scales, group_size, margin=margin)
    assert torch.equal(ternary_codes(latent, scales, group_size).to(torch.int8), codes)


@pytest.mark.parametrize("seed", range(3))
def test_latents_that_agree_are_the_weight(seed):
    weight, scales, _ = make(4, 12, 4, seed)
    codes = ternary_codes(weight, scales, 4).to(torch.int8)
    assert torch.equal(consistent_latent(weight, codes, scales, 4, margin=0.05), weight)
