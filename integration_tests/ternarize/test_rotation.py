# SPDX-License-Identifier: Apache-2.0
"""The block-Hadamard rotation, by itself and through a layer."""

import pytest
import torch

from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import hadamard_matrix, rotate, ternarize


def popcount_hadamard(block):
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return torch.tensor(rows, dtype=torch.float64) / block**0.5


@pytest.mark.parametrize("block", [2, 4, 32, 128, 256])
def test_matrix_is_the_popcount_formula(block):
    matrix = hadamard_matrix(block, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix, popcount_hadamard(block), atol=1e-15, rtol=0)
    torch.testing.assert_close(matrix @ matrix, torch.eye(block, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("columns", "block"), [(128, 128), (300, 128), (96, 32), (100, 128), (7, 2)])
def test_rotate_is_block_diagonal_and_leaves_the_rest(columns, block):
    x = torch.randn(3, 2, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    whole = columns // block
    dense = torch.block_diag(*[popcount_hadamard(block)] * whole, torch.eye(columns - whole * block).double())
    torch.testing.assert_close(rotate(x, block), x @ dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate(rotate(x, block), block), x, atol=1e-12, rtol=0)
    assert rotate(x, 0) is x


@pytest.mark.parametrize("activation_dtype", ["none", "int8", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("hadamard", "rank"), [(32, 0), (128, 4), (0, 3)])
def test_layer_multiplies_by_what_it_dequantizes_to(hadamard, rank, dtype, activation_dtype):
    generator = torch.Generator().manual_seed(hadamard + rank)
    weight = torch.randn(48, 300, generator=generator)
    packed = ternarize(weight, group_size=64, hadamard=hadamard, rank=rank)
    layer = TernaryLinear.from_weight(packed, torch.randn(48, generator=generator), activation_dtype=activation_dtype)
    x = torch.randn(5, 300, generator=generator).to(dtype)
    # The codes of the rotated weight, rotated back, and the factors: by the formula, in float64.
    whole = 300 // hadamard if hadamard else 0
    eye = torch.eye(300 - whole * hadamard).double()
    rotation = torch.block_diag(*[popcount_hadamard(hadamard)] * whole, eye) if hadamard else eye
    scales = packed.scale.double() * packed.multiplier.double() / 63
    dense = (packed.codes().double() * scales.repeat_interleave(64, 1)[:, :300]) @ rotation
    if rank:
        dense = dense + packed.low_rank.up.double() @ packed.low_rank.down.double()
    expected = x.double() @ dense.T + layer.bias.double()
    tolerance = 2e-5 if dtype != torch.bfloat16 and activation_dtype == "none" else 2e-2
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < tolerance, (error, tolerance)
    torch.testing.assert_close(layer.dequantize(torch.float32).double(), dense, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packed.dequantize().double(), dense, atol=1e-6, rtol=1e-5)


def test_gradient_of_the_input_is_that_of_the_dense_layer():
    generator = torch.Generator().manual_seed(0)
    packed = ternarize(torch.randn(24, 96, generator=generator), group_size=32, hadamard=32, rank=2)
    layer = TernaryLinear.from_weight(packed, activation_dtype="none")
    x = torch.randn(4, 96, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randn(4, 24, dtype=torch.float64, generator=generator)
    (layer(x) * target).sum().backward()
    torch.testing.assert_close(x.grad, target @ layer.dequantize(torch.float64), atol=1e-6, rtol=1e-6)


def test_rotation_helps_outliers():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 512, generator=generator)
    weight[:, ::37] *= 12  # columns of outliers, as trained transformers have
    errors = [(ternarize(weight, hadamard=block).dequantize() - weight).norm() for block in (0, 128)]
    assert errors[1] < 0.8 * errors[0]


def test_weights_narrower_than_the_block_are_not_rotated():
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
    assert ternarize(weight, hadamard=128).spec.hadamard == 0
