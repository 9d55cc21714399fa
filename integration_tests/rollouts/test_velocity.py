# SPDX-License-Identifier: Apache-2.0
"""The one error of denoisers, against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from diffusers_ternary.rollouts import DenoiserCall, normalized_error, velocity_error


class Scaled(torch.nn.Module):
    """Predicts its input, times a factor for each timestep."""

    def __init__(self, factors: dict[float, float]) -> None:
        super().__init__()
        self.factors = factors
        self.unit = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample * self.factors[float(timestep)] * self.unit,)


def calls() -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, generator=generator) for _ in range(4)]
    timesteps = [900.0, 100.0]
    return [
        DenoiserCall(i % 2, timesteps[i % 2], (state, torch.tensor(timesteps[i % 2])), {}, state)
        for i, state in enumerate(states)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_summed_over_all_pairs_in_float64(dtype):
    generator = torch.Generator().manual_seed(1)
    pairs = [[torch.randn(size, generator=generator).to(dtype) for _ in range(2)] for size in (5, 300)]
    ours, theirs = (np.concatenate([pair[k].float().numpy().astype(np.float64) for pair in pairs]) for k in (0, 1))
    assert normalized_error(pairs) == pytest.approx(((ours - theirs) ** 2).sum() / (theirs**2).sum(), rel=1e-12)


def test_equal_predictions_have_no_error_and_zero_ones_no_scale():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert normalized_error([(ones, ones)]) == 0.0
    assert normalized_error([(zeros, zeros)]) == 0.0
    assert math.isnan(normalized_error([(ones, zeros)]))
    assert math.isnan(normalized_error([(ones, ones), (ones * math.nan, ones)]))


def test_every_step_has_its_error_and_all_together_the_overall_one():
    error = velocity_error(Scaled({900.0: 1.5, 100.0: 0.9}), calls(), teacher_dtype=torch.float32, prompts=2)
    norms = [sum(float(call.output.double().square().sum()) for call in calls() if call.step == k) for k in (0, 1)]
    assert error.timesteps == (900.0, 100.0)
    assert error.per_step == pytest.approx((0.25, 0.01), rel=1e-5)
    assert error.overall == pytest.approx((0.25 * norms[0] + 0.01 * norms[1]) / sum(norms), rel=1e-5)
    assert (error.prompts, error.calls) == (2, 4)
