# SPDX-License-Identifier: Apache-2.0
"""Which rows, noise and conditioning a step gets; learning rates, phases and the divergence guard."""

import dataclasses
import json
import math

import pytest
import torch

from diffusers_ternary.distillation.config import DistillConfig
from diffusers_ternary.distillation.inputs import InputMaker, held_out_inputs, seeded
from diffusers_ternary.distillation.layout import TeacherBatch
from diffusers_ternary.distillation.noise import FLOW, NoiseProcess, Schedule
from diffusers_ternary.distillation.optimizer import rate_factor
from diffusers_ternary.distillation.phases import plan_phases
from diffusers_ternary.distillation.progress import DivergenceGuard, Progress


NOISE = NoiseProcess(FLOW, Schedule((1.0, 0.75, 0.5, 0.25), (1.0, 0.75, 0.5, 0.25)))
ROWS = 10


class Rows:
    """Row i is all i; rollout states are all 100 + i at timestep 0.125, a value that noise levels do not take."""

    def __init__(self, *, null=True, null_width=3):
        self.asked = []
        self._null = torch.full((1, null_width), -1.0) if null else None

    def __len__(self):
        return ROWS

    def batch(self, indices, generator):
        self.asked += list(indices)
        rows = torch.tensor([float(i) for i in indices])[:, None].expand(-1, 3)
        conditioning = {"text": rows.clone(), "ids": torch.arange(3), "nothing": None, "guidance": rows[:, 0].clone()}
        null = None if self._null is None else {**conditioning, "text": self._null.expand(len(rows), -1)}
        return TeacherBatch(rows.clone(), conditioning, null, (rows + 100, torch.full((len(rows),), 0.125)))


def maker(data=None, **changes):
    shared = {name: changes.pop(name) for name in ("process", "processes", "random_guidance") if name in changes}
    config = DistillConfig(batch_size=4, **changes)
    return InputMaker(data or Rows(), NOISE, config, **{"random_guidance": False, **shared})


def test_every_row_is_seen_once_an_epoch():
    data = Rows()
    made = maker(data)
    for step in range(5):
        made.make(step, 0)
    assert sorted(data.asked[:10]) == sorted(data.asked[10:20]) == list(range(ROWS))
    assert data.asked[:10] != data.asked[10:20]


def test_processes_and_forwards_share_an_epoch():
    seen = []
    for process in range(2):
        data = Rows()
        made = maker(data, process=process, processes=2, gradient_accumulation_steps=2)
        for step in range(5):
            for forward in range(2):
                made.make(step, forward)
        seen += data.asked
    assert sorted(seen) == sorted(list(range(ROWS)) * 8)


def test_inputs_are_a_function_of_the_step():
    one, other = maker().make(7, 1), maker().make(7, 1)
    assert torch.equal(one.sample, other.sample)
    assert torch.equal(one.timestep, other.timestep)
    assert not torch.equal(one.sample, maker().make(8, 1).sample)
    assert not torch.equal(one.sample, maker().make(7, 0).sample)
    assert not torch.equal(one.sample, maker(seed=1).make(7, 1).sample)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_of_rollout_states_and_null_prompts(share):
    made = maker(rollout_fraction=share, cfg_dropout=share)
    parts = [made.make(step, 0) for step in range(100)]
    rollout = torch.cat([part.timestep == 0.125 for part in parts]).float().mean()
    null = torch.cat([part.conditioning["text"][:, 0] == -1 for part in parts]).float().mean()
    assert float(rollout) == pytest.approx(share, abs=0.08)
    assert float(null) == pytest.approx(share, abs=0.08)
    for part in parts:
        states = part.timestep == 0.125
        assert bool((part.sample[states] >= 100).all())
        assert torch.equal(part.conditioning["ids"], torch.arange(3))
        assert part.conditioning["nothing"] is None


def test_guidance_is_drawn_only_where_asked():
    assert float(maker().make(0, 0).conditioning["guidance"].max()) <= ROWS
    drawn = maker(random_guidance=True, guidance_range=(50.0, 60.0)).make(0, 0).conditioning["guidance"]
    assert 50 <= float(drawn.min()) < float(drawn.max()) <= 60


def test_null_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="text has shape"):
        maker(Rows(null_width=2)).make(0, 0)


def test_held_out_inputs_are_states_of_the_teacher():
    made = held_out_inputs(Rows(), NOISE, [3, 4], draw=0)
    assert made.sample[:, 0].tolist() == [103, 104]
    assert made.timestep.tolist() == [0.125, 0.125]


def test_generators_of_neighbors_differ():
    draws = {seeded(a, b, c, d).initial_seed() for a in range(3) for b in range(9) for c in range(2) for d in range(2)}
    assert len(draws) == 3 * 9 * 2 * 2


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_rate_warms_up_and_decays(steps):
    factors = [rate_factor(step, steps) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0, abs=0.01)
    assert min(factors) > 0
    if steps == 100:
        assert factors[0] == pytest.approx(0.2)
        assert factors[52] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 47 / 95)))
        assert factors[-1] == pytest.approx(0.05, abs=0.01)


def test_phases():
    layers = ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.2.a"]
    order = ["blocks.1", "blocks.0", "blocks.2"]
    phases = plan_phases(DistillConfig(mode="blockwise", updates=40), layers, order)
    assert [(phase.name, phase.steps) for phase in phases] == [
        ("blocks.1", 10),
        ("blocks.0", 10),
        ("blocks.2", 10),
        ("scales", 10),
    ]
    assert list(phases[1].training) == ["blocks.0.a", "blocks.0.b"]
    assert all(training.latents for training in phases[1].training.values())
    assert not any(training.latents for training in phases[3].training.values())
    (full,) = plan_phases(DistillConfig(mode="full", updates=40), layers, order)
    assert full.block is None
    assert set(full.training) == set(layers)
    with pytest.raises(ValueError, match="updates=3 is too few"):
        plan_phases(DistillConfig(mode="blockwise", updates=3), layers, order)


def test_the_guard_stops_at_nan_and_at_explosions():
    assert "nan" in (DivergenceGuard().update(float("nan")) or "")
    guard = DivergenceGuard()
    assert all(guard.update(1.0 + 0.5 * (step % 2)) is None for step in range(50))
    verdicts = [guard.update(50.0) for _ in range(40)]
    assert verdicts[5] is None
    assert any(verdict and "rose" in verdict for verdict in verdicts)
    spike = DivergenceGuard()
    assert all(spike.update(20.0 if step == 30 else 1.0) is None for step in range(60))
    for progress in (Progress(guard=guard), Progress()):
        assert Progress.from_dict(json.loads(json.dumps(dataclasses.asdict(progress)))) == progress
