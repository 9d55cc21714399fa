# SPDX-License-Identifier: Apache-2.0
"""Column scales: their least squares against torch's, and what the solver makes of them."""

import pytest
import torch

from diffusers_ternary.calibration.basis import Basis, first_basis
from diffusers_ternary.calibration.config import SolverConfig
from diffusers_ternary.calibration.hessian import InputMoments, damp
from diffusers_ternary.calibration.solver import solve_layer
from diffusers_ternary.format import TernarySpec
from diffusers_ternary.ternarize import rotate


def problem(rows: int = 24, columns: int = 64, seed: int = 0):
    """A weight with columns of unequal size, and inputs of unequal size that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(2, columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * sizes[0]
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4000, columns, generator=generator) @ mixing * sizes[1]
    return weight, x, InputMoments(x.T @ x / len(x), x.mean(dim=0), len(x))


@pytest.mark.parametrize("block", [0, 16])
def test_the_refit_is_the_least_squares_solution(block):
    weight, x, moments = problem(rows=5, columns=32)
    coded = torch.randint(-1, 2, (32, 5), generator=torch.Generator().manual_seed(1)).float() + 0.1
    # Close to what the codes give, so that all scales are positive.
    target = rotate(coded.T, block) * torch.linspace(0.5, 2, 32) + 0.05 * weight
    basis = Basis(block, torch.ones(32)).refit(target.T.contiguous(), moments.second, coded)
    # One equation for each token and output: sum_j x_j (Q R)_nj s_j = (W x)_n.
    equations = (x[:, None, :] * rotate(coded.T, block)).reshape(-1, 32)
    expected = torch.linalg.lstsq(equations.double(), (x @ target.T).reshape(-1, 1).double()).solution[:, 0]
    assert bool((expected > 0).all())
    torch.testing.assert_close(basis.scale.double(), expected / expected.log().mean().exp(), rtol=2e-3, atol=0)
    assert torch.equal(basis.scale, basis.scale.half().float()), "as stored"


@pytest.mark.parametrize("block", [0, 16])
def test_a_basis_changes_inputs_and_weight_together(block):
    weight, x, moments = problem(columns=48)
    basis = first_basis(weight.T.contiguous(), moments.second, block)
    scaled = rotate(x * basis.scale, block)
    coded = basis.weight(weight.T.contiguous())
    torch.testing.assert_close(scaled @ coded, x @ weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(basis.dense(coded), weight.T, rtol=1e-4, atol=1e-5)
    inputs = basis.inputs(damp(moments.second, 1e-6), "layer").matrix
    expected = scaled.T @ scaled / len(x)
    torch.testing.assert_close(inputs, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_dead_inputs_and_columns_of_zeros_keep_finite_scales():
    weight, _, moments = problem()
    weight[:, 3] = 0.0
    moments.second[5] = moments.second[:, 5] = 0.0
    solved = solve_layer(weight, moments, TernarySpec(24, 64, 32, column_scales=True, hadamard=16))
    assert bool(torch.isfinite(solved.weight.dequantize()).all())
    assert 0 < solved.report.error < 0.2


@pytest.mark.parametrize("options", [{}, {"hadamard": 16}, {"rank": 2}, {"hadamard": 16, "rank": 2}], ids=str)
def test_unequal_columns_take_scales_and_the_reported_error_is_that_of_the_layer(options):
    weight, x, moments = problem()
    spec = TernarySpec(24, 64, 32, **options)
    plain = solve_layer(weight, moments, spec)
    solved = solve_layer(weight, moments, spec, config=SolverConfig(column_scales=True))
    assert solved.weight.spec.column_scales
    assert solved.report.column_scales
    assert "columns" in solved.report.stored_as
    assert solved.report.bits_per_weight == pytest.approx(plain.report.bits_per_weight + 16 / 24)
    error = (x @ (weight - solved.weight.dequantize()).T).square().sum() / (x @ weight.T).square().sum()
    assert solved.report.error == pytest.approx(float(error), rel=1e-3)
    assert solved.report.error < 0.9 * plain.report.error


def test_what_does_not_help_is_not_stored():
    # One group, whose codes and scales are exact: nothing is better.
    codes = torch.randint(-1, 2, (8, 16), generator=torch.Generator().manual_seed(0)).float()
    moments = InputMoments(torch.eye(16), torch.zeros(16), 100)
    solved = solve_layer(codes, moments, TernarySpec(8, 16, 16), config=SolverConfig(column_scales=True))
    assert not solved.weight.spec.column_scales
    assert solved.report.error < 1e-6
