# SPDX-License-Identifier: Apache-2.0
"""The solver's inner loops in C against those in torch."""

import pytest
import torch

from diffusers_ternary.calibration.descent import coordinate_descent
from diffusers_ternary.calibration.gptq import PANEL_COLUMNS, Coding, gptq
from diffusers_ternary.calibration.hessian import damp, quadratic
from diffusers_ternary.calibration.refit import refit_scales
from diffusers_ternary.kernels.cpu import coding as compiled
from diffusers_ternary.kernels.cpu import native


pytestmark = pytest.mark.skipif(not native.variants(), reason="the package was installed without its compiled library")


@pytest.fixture
def by_torch(monkeypatch):
    """Calls a function without the compiled library."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "serves", lambda values: False)
            return function(*args, **kwargs)

    return call


def problem(columns, rows, group_size):
    """Of small integers and halves, with which float32 makes no error."""
    generator = torch.Generator().manual_seed(columns + rows)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).float()

    weight = draw(-8, 9, columns, rows) / 4
    upper = draw(-2, 3, columns, columns).triu(1)
    hessian = upper + upper.T
    hessian.diagonal().copy_(2 ** draw(4, 7, columns))
    hessian[columns // 2] = hessian[:, columns // 2] = 0  # no input
    codes = draw(-1, 2, columns, rows).to(torch.int8)
    scales = draw(0, 4, -(-columns // group_size), rows) / 2
    return weight, hessian, Coding(codes, scales, group_size)


# Rows that do not fill a vector, and panels that begin inside groups.
@pytest.mark.parametrize(("columns", "rows", "group_size"), [(PANEL_COLUMNS + 90, 37, 100), (77, 16, 77), (40, 5, 16)])
def test_descent_and_group_sums_are_those_of_torch(by_torch, columns, rows, group_size):
    weight, hessian, coding = problem(columns, rows, group_size)
    before = coding.codes.clone()
    found, changed = coordinate_descent(weight, hessian, coding)
    expected, expected_changed = by_torch(coordinate_descent, weight, hessian, coding)
    assert torch.equal(found.codes, expected.codes)
    assert changed == expected_changed == int((found.codes != before).sum()) > 0
    assert torch.equal(coding.codes, before)

    part = slice(1, rows)
    sums = compiled.group_sums(weight[:, part], found.codes[:, part], group_size)
    parts = (weight * found.codes).double()[:, part].split(group_size)
    assert torch.equal(sums, torch.stack([p.sum(dim=0) for p in parts]))


@pytest.mark.parametrize(("columns", "group_size"), [(PANEL_COLUMNS + 70, 64), (200, 200)])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_stage_is_as_good_as_in_torch(by_torch, columns, group_size, threads):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(columns, 40, generator=generator)
    damped = damp(x.T @ x / len(x), 0.01)
    stages = {
        "gptq": lambda coding: gptq(weight, damped.upper, group_size=group_size),
        "refit": lambda coding: refit_scales(damped.matrix @ weight, damped.matrix, coding),
        "descent": lambda coding: coordinate_descent(weight, damped.matrix, coding)[0],
    }
    coding = None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, stage in stages.items():
            expected = by_torch(stage, coding)
            coding = stage(coding)
            assert (coding.codes != expected.codes).float().mean() < 1e-3, name
            errors = [quadratic(weight - found.dense(), damped.matrix) for found in (coding, expected)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-3), name
    finally:
        torch.set_num_threads(before)
