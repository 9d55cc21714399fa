# SPDX-License-Identifier: Apache-2.0
"""How far the student's denoiser is from the teacher's, step by step, on the teacher's own trajectories."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from . import DenoiserCall


@dataclasses.dataclass(frozen=True)
class VelocityError:
    """Normalised mean squared error of the denoiser output: mean |v_s - v_t|^2 / mean |v_t|^2.

    Args:
        timesteps (`tuple[float, ...]`): of each step, as the denoiser receives it.
        per_step (`tuple[float, ...]`): of each step, over all prompts and guidance branches. NaN where the teacher's
            output is zero and the student's is not, and where an output is not finite.
        overall (`float`): over all steps.
        prompts (`int`): prompts whose trajectories were used.
        calls (`int`): denoiser calls that were compared.
    """

    timesteps: tuple[float, ...]
    per_step: tuple[float, ...]
    overall: float
    prompts: int
    calls: int


@torch.no_grad()
def velocity_error(
    student: nn.Module, calls: Iterable[DenoiserCall], *, teacher_dtype: torch.dtype, prompts: int
) -> VelocityError:
    """Replays recorded calls through the student's denoiser.

    Args:
        student (`nn.Module`): of the teacher's architecture; called, not changed.
        calls (`Iterable[DenoiserCall]`): from [`recorded_calls`], of one or more pipeline calls.
        teacher_dtype (`torch.dtype`): inputs of this dtype are given to the student in its own.
        prompts (`int`): prompts behind the calls, for the record.
    """
    errors: dict[int, float] = {}
    norms: dict[int, float] = {}
    timesteps: dict[int, float] = {}
    count = 0
    for call in calls:
        expected = call.output.double()
        predicted = call.replay(student, dtype=teacher_dtype).double()
        errors[call.step] = errors.get(call.step, 0.0) + float((predicted - expected).square().sum())
        norms[call.step] = norms.get(call.step, 0.0) + float(expected.square().sum())
        timesteps.setdefault(call.step, call.timestep)
        count += 1
    steps = sorted(errors)
    return VelocityError(
        timesteps=tuple(timesteps[step] for step in steps),
        per_step=tuple(_ratio(errors[step], norms[step]) for step in steps),
        overall=_ratio(sum(errors.values()), sum(norms.values())),
        prompts=prompts,
        calls=count,
    )


def _ratio(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm else float("nan")
