# SPDX-License-Identifier: Apache-2.0
"""Packed layers concatenated by rows: the same outputs, and refusals that say what differs."""

import pytest
import torch
from torch import nn

from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Linear, TernaryLinear, concatenate_rows


def ternary(rows: int, seed: int, *, columns: int = 40, group_size: int = 16, bias: bool = True, **options):
    generator = torch.Generator().manual_seed(seed)
    layer = TernaryLinear(TernarySpec(rows, columns, group_size), bias=bias)
    layer.pack(torch.randn(rows, columns, generator=generator), **options)
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows, generator=generator), requires_grad=False)
    return layer


def int8(rows: int, seed: int):
    layer = Int8Linear(Int8Spec(rows, 40), bias=False)
    layer.pack(torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed)))
    return layer


CASES = {
    "group": lambda: [ternary(8, 0, scales="group"), ternary(6, 1, scales="group")],
    "double": lambda: [ternary(8, seed, scales="double") for seed in range(3)],
    "no bias": lambda: [ternary(8, 0, bias=False), ternary(8, 1, bias=False)],
    "hadamard": lambda: [ternary(8, 0, hadamard=16), ternary(8, 1, hadamard=16)],
    "ranks": lambda: [ternary(8, 0, rank=2), ternary(6, 1), ternary(8, 2, rank=3)],
    "int8": lambda: [int8(8, 0), int8(5, 1)],
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_side_by_side(case):
    layers = CASES[case]()
    joined = concatenate_rows({f"layer{i}": layer for i, layer in enumerate(layers)})
    assert type(joined) is type(layers[0])
    assert joined.out_features == sum(layer.out_features for layer in layers)
    expected = torch.cat([layer.dequantize() for layer in layers])
    torch.testing.assert_close(joined.dequantize(), expected, rtol=0, atol=1e-6)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], dim=-1), rtol=1e-5, atol=1e-5)


def test_scales_of_different_16_bit_types():
    small = ternary(8, 0, scales="group")
    small.weight_scale.data = (small.scales.float() * 1e-8).to(torch.bfloat16).view(torch.int16)
    small.scale_dtype = torch.bfloat16
    layers = [small, ternary(8, 1, scales="group")]
    joined = concatenate_rows(dict(zip("ab", layers, strict=True)))
    assert torch.equal(joined.dequantize(), torch.cat([layer.dequantize() for layer in layers]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(40, 8), "to_q, to_k are TernaryLinear, Linear: only packed layers of one kind"),
        (lambda: int8(8, 1), "TernaryLinear, Int8Linear: only packed layers of one kind"),
        (lambda: ternary(8, 1, group_size=8), "differ in more than their rows"),
        (lambda: ternary(8, 1, bias=False), "differ in more than their rows"),
        (lambda: ternary(8, 1).to("meta"), "Fuse projections before enabling offloading"),
    ],
)
def test_refusals(other, message):
    with pytest.raises(ValueError, match=message):
        concatenate_rows({"to_q": ternary(8, 0), "to_k": other()})


def test_fused_adapters_are_refused():
    layer = ternary(8, 1)
    layer.fuse(torch.zeros(8, 40))
    with pytest.raises(ValueError, match="Call unfuse_lora\\(\\) before fusing projections"):
        concatenate_rows({"to_q": ternary(8, 0), "to_k": layer})
