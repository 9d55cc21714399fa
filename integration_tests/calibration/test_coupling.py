# SPDX-License-Identifier: Apache-2.0
"""The search over coupled rows against the search row by row, and against its formula."""

import dataclasses

import pytest
import torch

from diffusers_ternary.calibration.codes import CodeSearch
from diffusers_ternary.calibration.config import SolverConfig
from diffusers_ternary.calibration.coupling import CoupledSearch
from diffusers_ternary.calibration.hessian import InputMoments, damp, quadratic
from diffusers_ternary.calibration.solver import OUTPUT_DAMPING, solve_layer
from diffusers_ternary.format import TernarySpec


CONFIG = SolverConfig(starts=1, descent_passes=1)
SPEC = TernarySpec(40, 64, 32, "group", 0, 0)


def random_moment(seed: int, size: int, rank: int) -> torch.Tensor:
    """Of correlated vectors of mean zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    x += 0.3 * torch.randn(4 * size, size, generator=generator)
    return x.T @ x / len(x)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    return weight, random_moment(1, 64, 16), random_moment(2, 40, 8)


def test_coupled_rows_leave_less_of_what_their_outputs_do_together(problem):
    weight, hessian, outputs = problem
    damped, target = damp(hessian, 0.01), weight.T.contiguous()
    outputs = damp(outputs, OUTPUT_DAMPING).matrix
    errors = []
    for search in (CodeSearch(target, damped, SPEC, CONFIG), CoupledSearch(target, damped, SPEC, CONFIG, outputs)):
        packed, dense = search.pack(search.search(search.start()))
        assert torch.allclose(packed.dequantize(), dense.T)
        errors.append(quadratic(target - dense, damped.matrix, outputs))
    assert errors[1] < 0.75 * errors[0]


def test_the_last_rows_are_solved_for_the_best_that_they_can_do(problem):
    weight, hessian, outputs = problem
    search = CoupledSearch(weight.T.contiguous(), damp(hessian, 0.01), SPEC, CONFIG, outputs)
    coding = search.search(search.start())
    last = search._blocks[-1]
    others = torch.tensor([row for row in range(40) if row not in last.tolist()])
    residual = weight.T[:, others] - coding.dense()[:, others]
    expected = residual @ outputs[others][:, last] @ torch.linalg.inv(outputs[last][:, last])
    torch.testing.assert_close(search._wanted[:, last] - weight.T[:, last], expected, atol=1e-3, rtol=1e-3)


def test_independent_outputs_couple_nothing(problem):
    weight, hessian, _ = problem
    damped, target = damp(hessian, 0.01), weight.T.contiguous()
    alone, coupled = (
        CodeSearch(target, damped, SPEC, CONFIG),
        CoupledSearch(target, damped, SPEC, CONFIG, torch.eye(40)),
    )
    errors = [
        quadratic(target - search.pack(search.search(search.start()))[1], damped.matrix) for search in (alone, coupled)
    ]
    torch.testing.assert_close(coupled._wanted, target)
    assert errors[1] <= errors[0]  # it descends once more


@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_reported_error_is_that_of_the_packed_layer(problem, hadamard, rank):
    weight, hessian, outputs = problem
    moments = InputMoments(hessian, torch.zeros(64), 256)
    spec = TernarySpec(40, 64, 32, "group", hadamard, rank)
    solved = solve_layer(weight, moments, spec, config=CONFIG, outputs=outputs)
    counted = (outputs + OUTPUT_DAMPING * outputs.diagonal().mean() * torch.eye(40)).double()

    def value(matrix: torch.Tensor) -> torch.Tensor:
        return torch.trace(counted @ matrix.double() @ hessian.double() @ matrix.double().T)

    expected = value(weight - solved.weight.dequantize()) / value(weight)
    assert solved.report.error == pytest.approx(float(expected), rel=1e-4)
    assert solved.report.error < solved.report.error_gptq < solved.report.error_rounded


def test_polish_lowers_what_coupled_rows_leave(problem):
    weight, hessian, outputs = problem
    moments = InputMoments(hessian, torch.zeros(64), 256)
    start, polished, again = (
        solve_layer(weight, moments, SPEC, config=dataclasses.replace(CONFIG, polish=steps), outputs=outputs)
        for steps in (0, 300, 300)
    )
    assert polished.report.error < 0.98 * start.report.error
    assert torch.equal(polished.weight.packed, again.weight.packed)
