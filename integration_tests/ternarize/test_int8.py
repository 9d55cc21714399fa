# SPDX-License-Identifier: Apache-2.0
"""Symmetric int8 rows: error bound, edges, bad values."""

import pytest
import torch

from diffusers_ternary.format import Int8Spec
from diffusers_ternary.layers.int8 import scaled_in_one_pass
from diffusers_ternary.ternarize import quantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_half_a_step(seed, dtype):
    weight = torch.randn(16, 77, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantized = quantize_int8(weight)
    assert quantized.spec == Int8Spec(16, 77)
    assert quantized.values.dtype == torch.int8
    assert quantized.scale.dtype == torch.float16
    assert int(quantized.values.abs().max()) == 127
    error = (quantized.dequantize().double() - weight.double()).abs()
    step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    # Half a step, and for the largest value of a row the rounding of the scale, 127 * 2^-12 of a step.
    assert (error <= step * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_pass_gives_the_same_bits(scale_dtype, dtype):
    values = torch.arange(-127, 128, dtype=torch.int8).repeat(64, 1)
    scale = torch.rand(64, 1).to(scale_dtype).float()
    assert torch.equal(scaled_in_one_pass(values, scale, dtype), (values.float() * scale).to(dtype))


def test_zero_rows_and_constants():
    weight = torch.stack([torch.zeros(9), torch.full((9,), 0.5), torch.full((9,), -0.25)])
    quantized = quantize_int8(weight)
    assert quantized.scale[0].item() == 0
    assert not quantized.values[0].any()
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=2**-10, atol=0)


@pytest.mark.parametrize("magnitude", [1e-9, 1e-3, 1e6])
def test_any_magnitude(magnitude):
    weight = magnitude * torch.linspace(-1, 1, 50).view(2, 25)
    restored = quantize_int8(weight).dequantize()
    assert ((restored - weight).abs() <= magnitude / 127 * (0.5 + 127 * 2**-8)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_with_the_layers_name(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"norm1\.linear: .*1 NaN or Inf of 12"):
        quantize_int8(weight, name="norm1.linear")


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int32)])
def test_only_float_matrices(weight):
    with pytest.raises(ValueError, match=r"expected a float \[N, K\] weight"):
        quantize_int8(weight)
