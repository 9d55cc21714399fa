# SPDX-License-Identifier: Apache-2.0
"""Packed convolutions against torch's own with the same dense weight."""

import copy

import pytest
import torch
from torch import nn

from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Conv2d, TernaryConv2d, conv, input_rows


CASES = {
    "pointwise": {"in_channels": 40, "out_channels": 24, "kernel_size": 1},
    "pointwise, strided": {"in_channels": 40, "out_channels": 24, "kernel_size": 1, "stride": 2},
    "pointwise, padded": {"in_channels": 40, "out_channels": 24, "kernel_size": 1, "padding": 1},
    "pointwise, no bias": {"in_channels": 40, "out_channels": 24, "kernel_size": 1, "bias": False},
    "3x3": {"in_channels": 12, "out_channels": 20, "kernel_size": 3, "padding": 1},
    "3x3, strided, dilated": {
        "in_channels": 12,
        "out_channels": 20,
        "kernel_size": 3,
        "padding": 2,
        "stride": 2,
        "dilation": 2,
    },
    "3x1, same": {"in_channels": 12, "out_channels": 20, "kernel_size": (3, 1), "padding": "same"},
}


def pack(kind, float_conv, **options):
    rows, columns = float_conv.weight.flatten(1).shape
    if kind == "int8":
        layer = Int8Conv2d(Int8Spec(rows, columns), float_conv, bias=False)
    else:
        layer = TernaryConv2d(TernarySpec(rows, columns, 16), float_conv, bias=False, activation_dtype="none")
    layer.bias = float_conv.bias
    layer.pack(float_conv.weight.detach(), **options)
    return layer


def dense_weight(layer):
    """The stored matrix by the formula, in float64, in the shape of the convolution's weight."""
    if isinstance(layer, Int8Conv2d):
        matrix = layer.weight.double() * layer.scales.double()
    else:
        codes = torch.stack([(layer.weight >> shift) & 3 for shift in (6, 4, 2, 0)], 1).flatten(1)  # [N, 4 KP]
        codes = torch.where(codes == 3, -1, codes)[:, : layer.spec.in_features].double()
        scales = layer.scales.double() * (1 if layer.spec.scales == "group" else layer.weight_multiplier.double() / 63)
        matrix = codes * scales.repeat_interleave(16, 1)[:, : layer.spec.in_features]
    return matrix.view(layer.out_channels, layer.in_channels, *layer.kernel_size)


@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, memory_format, kind):
    torch.manual_seed(len(case))
    float_conv = nn.Conv2d(**CASES[case])
    layer = pack(kind, float_conv)
    x = torch.randn(2, layer.in_channels, 9, 7).contiguous(memory_format=memory_format)
    weight, bias = dense_weight(layer), None if layer.bias is None else layer.bias.double()
    expected = torch.nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding, layer.dilation)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer(x[0]).double(), expected[0], atol=1e-5, rtol=1e-5)  # without a batch
    back = layer.to_float()
    assert type(back) is nn.Conv2d
    torch.testing.assert_close(back(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_wide_layers_are_unpacked_in_parts(monkeypatch):
    torch.manual_seed(0)
    layer = pack("ternary", nn.Conv2d(12, 20, 3, padding=1))
    x = torch.randn(2, 12, 6, 6)
    whole = layer(x)
    monkeypatch.setattr(conv, "SCRATCH_WEIGHTS", 7 * layer.spec.in_features)
    torch.testing.assert_close(layer(x), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["pointwise", "3x3"])
def test_gradient_of_the_input(case):
    torch.manual_seed(1)
    layer = pack("ternary", nn.Conv2d(**CASES[case]), hadamard=16, rank=2)
    x = torch.randn(2, layer.in_channels, 5, 5, dtype=torch.float64, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    layer.to_float(torch.float64)(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["pointwise", "3x3"])
def test_rotation_and_low_rank(case):
    torch.manual_seed(2)
    layer = pack("ternary", nn.Conv2d(**CASES[case]), hadamard=8, rank=3)
    x = torch.randn(1, layer.in_channels, 6, 6)
    torch.testing.assert_close(layer(x), layer.to_float()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["pointwise", "3x3"])
def test_compiles_without_breaks(case):
    torch.manual_seed(3)
    layer = pack("ternary", nn.Conv2d(**CASES[case]))
    x = torch.randn(1, layer.in_channels, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_copies_casts_and_prints():
    torch.manual_seed(4)
    layer = pack("ternary", nn.Conv2d(12, 20, 3, padding=1))
    before = layer.weight_scale.clone()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.weight_scale, before)
    assert half(torch.randn(1, 12, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    text = repr(layer)
    assert "12, 20, kernel_size=(3, 3)" in text
    assert "bits/weight" in text
    assert layer.kernel == "unpacked, torch conv2d"


def test_fused_weight_stands_in():
    torch.manual_seed(5)
    layer = pack("ternary", nn.Conv2d(12, 20, 3, padding=1))
    x, before = torch.randn(1, 12, 4, 4), None
    before = layer(x)
    other = nn.Conv2d(12, 20, 3, padding=1)
    layer.fuse(other.weight, other.bias)
    torch.testing.assert_close(layer(x), other(x))
    layer.unfuse()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"groups": 4}, "depthwise or grouped"), ({"padding": 1, "padding_mode": "circular"}, "circular padding")],
)
def test_what_cannot_be_packed_says_why(options, reason):
    float_conv = nn.Conv2d(8, 8, 3, **options)
    assert reason in conv.why_not_convertible(float_conv)
    with pytest.raises(ValueError, match=reason):
        TernaryConv2d(TernarySpec(8, 72, 8), float_conv)


def test_spec_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="is not the matrix"):
        TernaryConv2d(TernarySpec(8, 71, 8), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_input_times_the_matrix_are_the_output(case):
    torch.manual_seed(6)
    float_conv = nn.Conv2d(**CASES[case]).double()
    x = torch.randn(2, float_conv.in_channels, 9, 7, dtype=torch.float64)
    rows = input_rows(float_conv, x) @ float_conv.weight.flatten(1).T
    expected = float_conv(x) - (0 if float_conv.bias is None else float_conv.bias[:, None, None])
    torch.testing.assert_close(rows, expected.movedim(1, -1).flatten(0, -2), atol=1e-12, rtol=1e-12)
