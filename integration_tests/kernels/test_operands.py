# SPDX-License-Identifier: Apache-2.0
"""Packed layers refuse what the float layers refuse: operands on another device, inputs that are not float."""

import itertools

import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.kernels.ops import ternary_linear, ternary_unpack
from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.ternarize import ternarize


KINDS = {
    "ternary": {},
    "double": {"scale_layout": "double", "group_size": 16},
    "corrected": {"hadamard": 16, "rank": 2},
    "int8": {"kind": "int8"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
FLOAT = {
    "linear": (lambda: nn.Linear(64, 64), (2, 64)),
    "linear without bias": (lambda: nn.Linear(64, 64, bias=False), (2, 3, 64)),
    "conv 1x1": (lambda: nn.Conv2d(64, 32, 1), (1, 64, 4, 4)),
    "conv 3x3": (lambda: nn.Conv2d(64, 32, 3, padding=1), (1, 64, 4, 4)),
}


def packed(name: str, kind: str) -> tuple[QuantizedLayer, torch.Tensor]:
    make, shape = FLOAT[name]
    model = nn.ModuleList([nn.ModuleList([make()])])
    quantize(model, TernaryConfig(overrides={"*": KINDS[kind].get("kind", "ternary")}, **KINDS[kind]))
    return model[0][0], torch.randn(shape)


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(FLOAT, KINDS)])
@torch.no_grad()
def test_any_operand_on_meta_raises(name, kind):
    layer, x = packed(name, kind)
    expected = layer(x)
    for operand, parameter in list(layer.named_parameters()):
        setattr(layer, operand, nn.Parameter(parameter.to("meta"), requires_grad=False))
        with pytest.raises(RuntimeError, match="device"):
            layer(x)
        setattr(layer, operand, parameter)
    with pytest.raises(RuntimeError, match="device"):
        layer(x.to("meta"))
    assert torch.equal(layer(x), expected)
    assert layer.to("meta")(x.to("meta")).shape == expected.shape  # all of it there: shapes, as of any module


@pytest.mark.parametrize("name", FLOAT)
@torch.no_grad()
def test_a_fused_weight_on_meta_raises(name):
    layer, x = packed(name, "ternary")
    layer.fuse(layer.dequantize().to("meta"))
    with pytest.raises(RuntimeError, match="weight is on meta and the input on cpu"):
        layer(x)


def test_operators_on_their_own():
    weight = ternarize(torch.randn(64, 64), group_size=16, scales="double")
    operands = {"weight": weight.packed, "scale": weight.scale, "multiplier": weight.multiplier}
    for name in (*operands, "bias"):
        given = {**operands, "bias": torch.zeros(64)}
        given[name] = given[name].to("meta")
        with pytest.raises(RuntimeError, match=f"{name} is on meta and the input on cpu"):
            ternary_linear(torch.zeros(8, 64), *given.values(), 64, 16, "auto", 0)
    for name in ("scale", "multiplier"):
        given = {**operands, name: operands[name].to("meta")}
        with pytest.raises(RuntimeError, match=f"{name} is on meta"):
            ternary_unpack(*given.values(), 64, 16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(FLOAT, KINDS)])
@torch.no_grad()
def test_inputs_that_are_not_float_raise_as_for_the_float_layer(name, kind, dtype):
    layer, x = packed(name, kind)
    for module in (FLOAT[name][0](), layer):
        with pytest.raises(RuntimeError):
            module(x.to(dtype))
        if not dtype.is_floating_point:  # those autocast casts, for both
            with torch.autocast("cpu"), pytest.raises(RuntimeError):
                module(x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_every_width_are_served(dtype):
    layer, x = packed("linear", "ternary")
    assert layer(x.to(dtype)).dtype == dtype
