# SPDX-License-Identifier: Apache-2.0
"""Noise levels, mixing and timesteps against the schedulers' own, and against what real pipelines hand over."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KarrasVeScheduler,
)

from diffusers_ternary.distillation.noise import (
    FLOW,
    VARIANCE_PRESERVING,
    NoiseProcess,
    Schedule,
    noise_process,
    observe_noise,
)
from diffusers_ternary.rollouts import make_rollouts
from integration_tests.support.pipelines import PIPELINES


def latents(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 6, 6, generator=generator), torch.randn(count, 4, 6, 6, generator=generator)


def ran(scheduler, steps=6, **kwargs):
    scheduler.set_timesteps(steps, **kwargs)
    return scheduler


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_mixes_like_the_scheduler(shift, seed):
    scheduler = ran(FlowMatchEulerDiscreteScheduler(shift=shift))
    process = noise_process(scheduler, [float(t) / 1000 for t in scheduler.timesteps])
    assert process.family == FLOW
    sample, noise = latents(seed, len(scheduler.timesteps))
    levels = torch.tensor(process.schedule.levels)
    torch.testing.assert_close(
        process.mix(sample, noise, levels), scheduler.scale_noise(sample, scheduler.timesteps, noise)
    )
    torch.testing.assert_close(process.timesteps(levels), scheduler.timesteps / 1000)
    assert process.shift == pytest.approx(shift, rel=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_variance_preserving_mixes_like_the_scheduler(cls, prediction):
    scheduler = ran(cls(prediction_type=prediction))
    process = noise_process(scheduler, [float(t) for t in scheduler.timesteps])
    assert process.family == VARIANCE_PRESERVING
    sample, noise = latents(0, 4)
    levels = torch.tensor([0.0, 17.0, 500.0, 999.0])
    torch.testing.assert_close(process.mix(sample, noise, levels), scheduler.add_noise(sample, noise, levels.long()))
    torch.testing.assert_close(process.timesteps(levels), levels)


def test_schedulers_in_sigma_give_the_model_the_same_state():
    scheduler = ran(EulerDiscreteScheduler(timestep_spacing="leading"))  # steps that are integers
    process = noise_process(scheduler, [float(t) for t in scheduler.timesteps])
    sample, noise = latents(0, 1)
    step = scheduler.timesteps[3:4]
    state = scheduler.add_noise(sample, noise, step)
    scaled = scheduler.scale_model_input(state, step[0])
    torch.testing.assert_close(process.mix(sample, noise, step), scaled)


def test_flow_with_a_multistep_solver():
    scheduler = ran(
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    process = noise_process(scheduler, [float(t) for t in scheduler.timesteps])
    assert process.family == FLOW
    levels = torch.tensor(process.schedule.levels)
    torch.testing.assert_close(process.timesteps(levels), scheduler.timesteps.float(), rtol=1e-2, atol=1.0)


def test_solvers_that_visit_a_level_twice():
    scheduler = ran(HeunDiscreteScheduler())
    unique = list(dict.fromkeys(float(t) for t in scheduler.timesteps))
    assert len(unique) < len(scheduler.timesteps)
    assert len(noise_process(scheduler, unique).schedule.levels) == len(unique)


@pytest.mark.parametrize("seed", [0, 1])
def test_levels_are_logit_normal_and_uniform(seed):
    process = NoiseProcess(FLOW, Schedule((1.0, 0.5), (1.0, 0.5)), uniform_fraction=0.2)
    levels = process.draw_levels(20_000, torch.Generator().manual_seed(seed))
    assert 0 < float(levels.min()) < float(levels.max()) <= 1
    # P(sigmoid(z) < 0.1) = 0.0140, uniform 0.1: the mixture is 0.8 * 0.0140 + 0.2 * 0.1
    assert float((levels < 0.1).float().mean()) == pytest.approx(0.0312, abs=0.005)
    again = process.draw_levels(20_000, torch.Generator().manual_seed(seed))
    assert torch.equal(levels, again)


def test_few_step_models_stay_on_their_schedule():
    scheduler = ran(FlowMatchEulerDiscreteScheduler(), 4)
    received = [float(t) for t in scheduler.timesteps]
    process = noise_process(scheduler, received)
    assert process.on_schedule
    drawn = process.draw_levels(100, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(process.schedule.levels)
    assert not noise_process(scheduler, received, timesteps="logit_normal").on_schedule
    single = ran(FlowMatchEulerDiscreteScheduler(), 1)
    assert noise_process(single, [1.0]).timesteps(torch.tensor([0.5])).tolist() == [0.5]


def test_discrete_levels_are_integers_of_the_schedule():
    scheduler = ran(DDIMScheduler())
    levels = noise_process(scheduler, [float(t) for t in scheduler.timesteps]).draw_levels(
        500, torch.Generator().manual_seed(0)
    )
    assert torch.equal(levels, levels.floor())
    assert 0 <= float(levels.min()) <= float(levels.max()) <= 999


@pytest.mark.parametrize("name", list(PIPELINES))
def test_timesteps_are_what_the_denoiser_receives(name):
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    call = {"num_inference_steps": 5, "height": tiny.size, "width": tiny.size, **tiny.call}
    rollouts = make_rollouts(pipeline, ["a red cat"], seed=0, batch_size=1, call_kwargs=call)
    process = observe_noise(pipeline, pipeline.components[tiny.denoiser], rollouts, timesteps="auto")
    assert len(process.schedule.timesteps) == 5
    made = process.timesteps(torch.tensor(process.schedule.levels))
    torch.testing.assert_close(made, torch.tensor(process.schedule.timesteps), rtol=1e-3, atol=1e-3)
    if name == "flux":
        assert 0 < max(process.schedule.timesteps) <= 1
    if name == "z_image":
        assert process.schedule.timesteps[0] < process.schedule.timesteps[-1]  # counts backwards


def test_a_scheduler_of_another_family_is_refused():
    scheduler = KarrasVeScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="neither flow matching nor"):
        noise_process(scheduler, [1.0, 2.0, 3.0])


def test_timesteps_that_do_not_fit_are_refused():
    scheduler = ran(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="6 noise levels, but the denoiser was called at 2 timesteps"):
        noise_process(scheduler, [1.0, 0.5])
    with pytest.raises(ValueError, match="not an affine function"):
        noise_process(scheduler, [float(t) ** 2 for t in scheduler.timesteps])
