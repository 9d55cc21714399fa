# SPDX-License-Identifier: Apache-2.0
"""The low-rank correction against the optimum that theory gives."""

import pytest
import torch

from diffusers_ternary.ternarize import low_rank_residual, ternarize


def test_plain_residual_is_the_truncated_svd():
    residual = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(residual)
    for rank in (1, 5, 40):
        error = (low_rank_residual(residual, rank).dense().double() - residual).square().sum()
        assert float(error) == pytest.approx(
            float(values[rank:].square().sum()), rel=2e-3, abs=1e-3
        )  # float16 factors


def test_whitened_residual_minimizes_the_output_error():
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(32, 48, dtype=torch.float64, generator=generator)
    x = torch.randn(500, 48, dtype=torch.float64, generator=generator) @ torch.diag(torch.logspace(-2, 2, 48).double())
    hessian = x.T @ x / 500
    whitening = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # upper triangular R, R Rᵀ = H

    def output_error(low_rank):
        left = residual - low_rank.dense().double()
        return float((left @ hessian @ left.T).trace())

    best = float(torch.linalg.svdvals(residual @ whitening)[4:].square().sum())  # Eckart-Young in the weighted norm
    assert output_error(low_rank_residual(residual, 4, whitening=whitening)) == pytest.approx(best, rel=1e-2)
    assert output_error(low_rank_residual(residual, 4)) > 2 * best


def test_large_matrices_use_the_same_numbers_every_time():
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(600, 8, generator=generator) @ torch.randn(8, 700, generator=generator)
    torch.manual_seed(1)
    first = low_rank_residual(residual, 8)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = low_rank_residual(residual, 8)
    assert torch.equal(first.up, second.up)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's random numbers change
    torch.testing.assert_close(first.dense(), residual, atol=0.05, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_factors_stay_in_the_range_of_float16(scale):
    generator = torch.Generator().manual_seed(3)
    residual = scale * torch.randn(32, 48, generator=generator)
    whitening = 1e4 * torch.eye(48)
    low_rank = low_rank_residual(residual, 32, whitening=whitening)
    assert float((low_rank.dense() - residual).norm() / residual.norm()) < 5e-3


def test_zero_residual_gives_zero_factors():
    assert float(low_rank_residual(torch.zeros(8, 9), 2).dense().abs().max()) == 0


def test_ternarize_adds_the_rank_it_can():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    packed = ternarize(weight, group_size=32, rank=99)
    assert packed.spec.rank == 16  # the smaller side
    torch.testing.assert_close(packed.dequantize(), weight, atol=5e-3, rtol=0)
