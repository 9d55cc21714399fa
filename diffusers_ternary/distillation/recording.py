# SPDX-License-Identifier: Apache-2.0
"""Lets the teacher draw prompts and keeps what a student can be trained on."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..rollouts import (
    DenoiserCall,
    RolloutBatch,
    Rollouts,
    named_arguments,
    recorded_calls,
    sample_name,
    takes_output_type,
    timestep_name,
)
from .layout import REPEATED, SHARED, Branch, InputLayout, Path, TeacherRow, find_kinds, leaves, same


logger = logging.getLogger(__name__)
_DENOISERS = ("transformer", "unet")


@dataclasses.dataclass(frozen=True)
class _Step:
    """The conditional branch at one step: x_t [B, ...], the inputs of each row, and the timesteps [B]."""

    states: torch.Tensor
    inputs: list[dict[Path, torch.Tensor]]
    timesteps: torch.Tensor

    def check_inputs(self, first: "_Step") -> None:
        """Checks that the inputs are those of the first step."""
        for now, before in zip(self.inputs, first.inputs, strict=True):
            for path, value in now.items():
                if not same(value, before.get(path)):
                    raise ValueError(
                        f"The pipeline changes the denoiser's input {'.'.join(path)} from step to step. distill needs "
                        "it to stay the same."
                    )


class TeacherRecorder:
    """Draws prompts with a pipeline, exactly as its user would, and takes the denoiser's calls apart.

    Args:
        pipeline (`DiffusionPipeline`): the teacher.
        rollouts ([`Rollouts`]): prompts, seeds and call arguments.
        rollout_states (`int`): states of each trajectory to keep, at random steps; 0 = none.
        component (`str`, *optional*): the denoiser; default: `transformer` or `unet`.

    Raises:
        ValueError: if the pipeline has no such denoiser, or does not return latents.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, rollouts: Rollouts, *, rollout_states: int, component: str | None = None
    ) -> None:
        if not takes_output_type(pipeline):
            raise ValueError(f"{type(pipeline).__name__} takes no output_type, so it does not give its latents.")
        self.pipeline = pipeline
        self.rollouts = rollouts
        self.rollout_states = rollout_states
        self.denoiser = find_denoiser(pipeline, component)

    def find_layout(self) -> InputLayout:
        """Learns how the pipeline calls its denoiser, from trajectories of the first prompt alone and twice.

        Call inside `prepared(pipeline)`.

        Raises:
            ValueError: for pipelines with more than two guidance branches, or inputs that change over the steps.
        """
        prompt, seed = self.rollouts.prompts[0], self.rollouts.seed
        with _recorded_steps(self.pipeline) as directions:
            one, _ = self._observe(RolloutBatch((prompt,), (seed,)))
        two, _ = self._observe(RolloutBatch((prompt, prompt), (seed, seed)))
        branches = self._branches(one, prompts=1)
        names = sample_name(self.denoiser), timestep_name(self.denoiser)
        layouts = []
        for (call, row), (other, _) in zip(branches, self._branches(two, prompts=2), strict=True):
            inputs, doubled = self._inputs(call), self._inputs(other)
            kinds = find_kinds(inputs, doubled, rows_of_one=self._row_count(call))
            shared = {
                path: value[0] if kinds[path] == REPEATED else value
                for path, value in leaves(inputs)
                if kinds[path] in (SHARED, REPEATED)
            }
            branch = Branch(kinds, shared)
            layouts.append((branch, branch.rows(inputs, row, row + 1)[0]))
        listed = isinstance(named_arguments(self.denoiser, one[0])[names[0]], list)
        conditional = 0
        if len(layouts) == 2:
            # Negative first where both go in together, else last: what most pipelines of diffusers do.
            usual = int(len(branches[0][0].output) == 2 and not listed)
            conditional = _conditional_branch(one, directions, usual=usual)
        if len(layouts) == 1:
            return InputLayout(*names, listed, layouts[0][0])
        null, null_row = layouts[1 - conditional]
        return InputLayout(*names, listed, layouts[conditional][0], null, null_row, conditional)

    def record(self, layout: InputLayout, batch: RolloutBatch) -> list[TeacherRow]:
        """Draws a batch of prompts.

        Call inside `prepared(pipeline)`.

        Raises:
            ValueError: for NaN or Inf, inputs that change over the steps, or latents that are not what the denoiser
                takes.
        """
        calls, latents = self._observe(batch)
        return self.rows(layout, batch, calls, latents)

    def rows(
        self, layout: InputLayout, batch: RolloutBatch, calls: list[DenoiserCall], latents: torch.Tensor
    ) -> list[TeacherRow]:
        """What the observed calls of one batch hold for each of its prompts."""
        count = len(batch.prompts)
        steps = self._steps(calls, layout, count)
        samples = self._clean(latents, steps[0].states)
        rows = []
        for i, seed in enumerate(batch.seeds):
            if not torch.isfinite(samples[i]).all():
                raise ValueError(
                    f"The teacher draws NaN or Inf for {batch.prompts[i]!r} (seed {seed}). Load it in bfloat16 or "
                    "float32, or remove the prompt."
                )
            inputs = steps[0].inputs[i]
            states = timesteps = None
            if self.rollout_states:
                # Of its own generator, so that the choice depends on the prompt's seed alone.
                order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
                kept = sorted(order[: self.rollout_states].tolist())
                states = torch.stack([steps[k].states[i] for k in kept])
                timesteps = torch.stack([steps[k].timesteps[i] for k in kept])
            rows.append(TeacherRow(samples[i].clone(), inputs, states, timesteps))
        return rows

    def _steps(self, calls: list[DenoiserCall], layout: InputLayout, count: int) -> list["_Step"]:
        steps: list[_Step] = []
        for number in range(calls[-1].step + 1):
            branches = self._branches([call for call in calls if call.step == number], prompts=count)
            # Pipelines may leave guidance out at some steps; what is left is the conditional branch.
            call, start = branches[layout.position if len(branches) > 1 else 0]
            arguments = named_arguments(self.denoiser, call)
            sample = arguments[layout.sample]
            sample = torch.stack(sample) if layout.listed else sample
            timesteps = torch.as_tensor(arguments[layout.timestep]).reshape(-1)
            timesteps = timesteps[start : start + count] if len(timesteps) > 1 else timesteps.expand(count)
            inputs = layout.conditional.rows(self._inputs(call), start, start + count)
            step = _Step(sample[start : start + count], inputs, timesteps)
            step.check_inputs(steps[0] if steps else step)
            steps.append(step)
        return steps

    def draw(self, batch: RolloutBatch) -> torch.Tensor:
        """One pipeline call: clean latents, float32 on the CPU.

        Raises:
            ValueError: if the pipeline returns something else.
        """
        latents = self.rollouts.draw(self.pipeline, batch)
        if not isinstance(latents, torch.Tensor) or len(latents) != len(batch.prompts):
            raise ValueError(f"{type(self.pipeline).__name__} does not return one tensor of latents per prompt.")
        return latents.detach().to("cpu", torch.float32)

    def _observe(self, batch: RolloutBatch) -> tuple[list[DenoiserCall], torch.Tensor]:
        with recorded_calls(self.denoiser) as calls:
            latents = self.draw(batch)
        if not calls:
            raise ValueError(f"The pipeline did not call its {type(self.denoiser).__name__}; name the component.")
        return calls, latents

    def _branches(self, calls: list[DenoiserCall], *, prompts: int) -> list[tuple[DenoiserCall, int]]:
        """The guidance branches of the first step of `calls`: the call, and the branch's first row in it."""
        first = [call for call in calls if call.step == calls[0].step]
        branches = [(call, start) for call in first for start in range(0, self._row_count(call), prompts)]
        if len(branches) > 2 or any(self._row_count(call) % prompts for call in first):
            raise ValueError(
                f"{type(self.pipeline).__name__} calls its denoiser with {[self._row_count(c) for c in first]} rows "
                f"in one step for {prompts} prompts. distill knows one branch, or two of classifier-free guidance; "
                "leave further guidance out of call_kwargs."
            )
        return branches

    def _inputs(self, call: DenoiserCall) -> dict[str, Any]:
        skipped = sample_name(self.denoiser), timestep_name(self.denoiser)
        return {name: value for name, value in named_arguments(self.denoiser, call).items() if name not in skipped}

    def _row_count(self, call: DenoiserCall) -> int:
        return len(named_arguments(self.denoiser, call)[sample_name(self.denoiser)])

    def _clean(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if latents[0].numel() != like[0].numel():
            raise ValueError(
                f"The latents are {list(latents.shape[1:])} per prompt, the denoiser takes {list(like.shape[1:])}. "
                "distill trains denoisers whose input is the latents alone, without images or masks beside them."
            )
        return latents.reshape(len(latents), *like.shape[1:])


def find_denoiser(pipeline: DiffusionPipeline, component: str | None = None) -> nn.Module:
    """The model that is called at every step.

    Raises:
        ValueError: if there is none of that name; if none is given, neither `transformer` nor `unet`.
    """
    for name in (component,) if component else _DENOISERS:
        model = pipeline.components.get(name)
        if isinstance(model, nn.Module):
            return model
    names = ", ".join(name for name, part in pipeline.components.items() if isinstance(part, nn.Module))
    raise ValueError(
        f"{type(pipeline).__name__} has no {component or ' or '.join(_DENOISERS)} to distill. Choose from {names}."
    )


@contextlib.contextmanager
def _recorded_steps(pipeline: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Records what the scheduler is told to follow at each step, on the CPU."""
    scheduler, original = pipeline.scheduler, pipeline.scheduler.step
    directions: list[torch.Tensor] = []

    @functools.wraps(original)  # pipelines look at its signature
    def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        directions.append(model_output.detach().cpu())
        return original(model_output, *args, **kwargs)

    scheduler.step = step
    try:
        yield directions
    finally:
        del scheduler.step


def _conditional_branch(calls: list[DenoiserCall], directions: list[torch.Tensor], *, usual: int) -> int:
    """Which of two branches is the prompt's: u + g (c - u) has more of c than of u in it.

    Guidance that rescales or renormalises changes both shares by one factor, so their order stays.
    """
    products, target = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for number, direction in enumerate(directions):
        outputs = [row for call in calls if call.step == number for row in call.output]
        if len(outputs) != 2:
            continue
        # Learned variances follow the prediction and are not part of the direction.
        size = direction.numel()
        pair = torch.stack([row.flatten()[:size].double() for row in outputs])  # [2, values]
        products += pair @ pair.T
        target += pair @ direction.flatten().double()
    if float(torch.linalg.cond(products)) < 1e10:
        shares = torch.linalg.solve(products, target).abs()
        return int(shares[1] > shares[0])
    logger.warning("The guidance branches predict the same; the usual order of diffusers is taken for theirs.")
    return usual
