# SPDX-License-Identifier: Apache-2.0
"""How far the student's denoiser is from the teacher's, step by step, on the teacher's own trajectories."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from .calls import DenoiserCall


def normalized_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """mean |v_s - v_t|^2 / mean |v_t|^2 over any number of predictions: the error of a denoiser.

    Args:
        pairs (`Iterable[tuple[torch.Tensor, torch.Tensor]]`): the student's and the teacher's prediction of each
            call, of one shape; on any device, of any floating dtype.

    Returns:
        `float`: 0 if all are equal; NaN where an output is not finite, or the teacher's are zero and the student's
        are not.
    """
    total = _Squares()
    for predicted, expected in pairs:
        total += _Squares.of(predicted, expected)
    return total.ratio


@dataclasses.dataclass(frozen=True)
class VelocityError:
    """Normalized mean squared error of the denoiser output: mean |v_s - v_t|^2 / mean |v_t|^2.

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
    squares: dict[int, _Squares] = {}
    timesteps: dict[int, float] = {}
    count = 0
    for call in calls:
        found = _Squares.of(call.replay(student, dtype=teacher_dtype), call.output)
        squares[call.step] = squares.get(call.step, _Squares()) + found
        timesteps.setdefault(call.step, call.timestep)
        count += 1
    steps = sorted(squares)
    return VelocityError(
        timesteps=tuple(timesteps[step] for step in steps),
        per_step=tuple(squares[step].ratio for step in steps),
        overall=sum(squares.values(), start=_Squares()).ratio,
        prompts=prompts,
        calls=count,
    )


@dataclasses.dataclass(frozen=True)
class _Squares:
    """Sums of |v_s - v_t|^2 and |v_t|^2, in float64: a sum over many calls in less loses small terms."""

    error: float = 0.0
    norm: float = 0.0

    @classmethod
    def of(cls, predicted: torch.Tensor, expected: torch.Tensor) -> "_Squares":
        ours, theirs = predicted.cpu().double(), expected.cpu().double()
        return cls(float((ours - theirs).square().sum()), float(theirs.square().sum()))

    def __add__(self, other: "_Squares") -> "_Squares":
        return _Squares(self.error + other.error, self.norm + other.norm)

    @property
    def ratio(self) -> float:
        if self.error == 0.0:
            return 0.0
        return self.error / self.norm if self.norm else float("nan")
