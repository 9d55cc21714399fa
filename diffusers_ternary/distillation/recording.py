# SPDX-License-Identifier: Apache-2.0
"""Lets the teacher draw prompts and keeps what a student can be trained on."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
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
    weights_sha256,
)
from .identity import json_values
from .layout import REPEATED, SHARED, Branch, InputLayout, Path, TeacherRow, find_kinds, leaves, same


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TeacherRecorder:
    """Draws prompts with a pipeline, exactly as its user would, and takes the denoiser's calls apart.

    Args:
        pipeline (`DiffusionPipeline`): the teacher.
        component (`str`): its denoiser.
        rollouts ([`Rollouts`]): prompts, seeds and call arguments.
        rollout_states (`int`, *optional*, defaults to 4): states x_t of each trajectory to keep, at random steps;
            0 = none.

    Raises:
        ValueError: if the pipeline has no such denoiser, or does not return latents.
    """

    pipeline: DiffusionPipeline
    component: str
    rollouts: Rollouts
    rollout_states: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.rollout_states, int) or self.rollout_states < 0:
            raise ValueError(f"rollout_states={self.rollout_states!r} is not an integer of 0 or more.")
        if not takes_output_type(self.pipeline):
            raise ValueError(f"{type(self.pipeline).__name__} takes no output_type, so it does not give its latents.")
        if self.component not in self._modules():
            raise ValueError(
                f"{type(self.pipeline).__name__} has no {self.component} to distill. Choose from "
                f"{', '.join(self._modules())}."
            )

    @property
    def denoiser(self) -> nn.Module:
        """The model that is called at every step."""
        return self._modules()[self.component]

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def weights_sha256(self) -> str:
        """Hash of all weights of the pipeline."""
        return weights_sha256(self._modules())

    def identity(self) -> dict[str, Any]:
        """Everything that the rows depend on, as JSON values."""
        scheduler = self.pipeline.scheduler
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return json_values(
            {
                "pipeline": type(self.pipeline).__name__,
                "component": self.component,
                "weights_sha256": self.weights_sha256(),
                "scheduler": {"class": type(scheduler).__name__, **settings},
                "call_kwargs": dict(self.rollouts.call_kwargs),
                "prompts_sha256": self.rollouts.sha256(),
                "seed": self.rollouts.seed,
                "batch_size": self.rollouts.batch_size,
                "rollout_states": self.rollout_states,
            }
        )

    def find_layout(self) -> InputLayout:
        """Learns how the pipeline calls its denoiser, from trajectories of the first prompt alone and twice.

        Call inside `prepared(pipeline)`.

        Raises:
            ValueError: for pipelines with more than two guidance branches, or inputs that change over the steps.
        """
        prompt, seed = self.rollouts.prompts[0], self.rollouts.seed
        directions: list[torch.Tensor] = []
        with watched_steps(self.pipeline.scheduler, lambda output: directions.append(output.detach().cpu())):
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
        if len(layouts) == 1:
            return InputLayout(*names, listed, layouts[0][0])
        # Negative first where both go in together, else last: what most pipelines of diffusers do.
        usual = int(len(branches[0][0].output) == 2 and not listed)
        conditional = _conditional_branch(one, directions, usual=usual)
        null, null_row = layouts[1 - conditional]
        return InputLayout(*names, listed, layouts[conditional][0], null, null_row, conditional)

    def record(self, layout: InputLayout, batch: RolloutBatch) -> list[TeacherRow]:
        """Draws a batch of prompts.

        Call inside `prepared(pipeline)`.

        Raises:
            ValueError: for NaN or Inf, inputs that change over the steps, or latents that are not what the denoiser
                takes.
        """
        return self.rows(layout, batch, *self._observe(batch))

    def rows(
        self, layout: InputLayout, batch: RolloutBatch, calls: list[DenoiserCall], latents: torch.Tensor
    ) -> list[TeacherRow]:
        """What the observed calls of one batch hold for each of its prompts."""
        steps = self._steps(calls, layout, len(batch.prompts))
        like = steps[0].states
        if latents[0].numel() != like[0].numel():
            raise ValueError(
                f"The latents are {list(latents.shape[1:])} per prompt, the denoiser takes {list(like.shape[1:])}. "
                "distill trains denoisers whose input is the latents alone, without images or masks beside them."
            )
        samples = latents.reshape(len(latents), *like.shape[1:])
        rows = []
        for i, seed in enumerate(batch.seeds):
            if not torch.isfinite(samples[i]).all():
                raise ValueError(
                    f"The teacher draws NaN or Inf for {batch.prompts[i]!r} (seed {seed}). Load it in bfloat16 or "
                    "float32, or remove the prompt."
                )
            states = timesteps = None
            if self.rollout_states:
                # Of its own generator, so that the choice depends on the prompt's seed alone.
                order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
                kept = sorted(order[: self.rollout_states].tolist())
                states = torch.stack([steps[k].states[i] for k in kept])
                timesteps = torch.stack([steps[k].timesteps[i] for k in kept])
            rows.append(TeacherRow(samples[i].clone(), steps[0].inputs[i], states, timesteps))
        return rows

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
            steps.append(_Step(sample[start : start + count], inputs, timesteps))
            steps[-1].check_inputs(steps[0])
        return steps

    def _branches(self, calls: list[DenoiserCall], *, prompts: int) -> list[tuple[DenoiserCall, int]]:
        """The guidance branches of the first step of `calls`: the call, and the branch's first row in it."""
        first = [call for call in calls if call.step == calls[0].step]
        counts = [self._row_count(call) for call in first]
        branches = [
            (call, start) for call, rows in zip(first, counts, strict=True) for start in range(0, rows, prompts)
        ]
        if len(branches) > 2 or any(rows % prompts for rows in counts):
            raise ValueError(
                f"{type(self.pipeline).__name__} calls its denoiser with {counts} rows in one step for {prompts} "
                "prompts. distill knows one branch, or two of classifier-free guidance; leave further guidance out "
                "of call_kwargs."
            )
        return branches

    def _inputs(self, call: DenoiserCall) -> dict[str, Any]:
        skipped = sample_name(self.denoiser), timestep_name(self.denoiser)
        return {name: value for name, value in named_arguments(self.denoiser, call).items() if name not in skipped}

    def _row_count(self, call: DenoiserCall) -> int:
        return len(named_arguments(self.denoiser, call)[sample_name(self.denoiser)])


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


@contextlib.contextmanager
def watched_steps(scheduler: Any, watch: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Calls a function after each step of a scheduler, with what the scheduler was told to follow."""
    original = scheduler.step

    @functools.wraps(original)  # pipelines look at its signature
    def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(model_output, *args, **kwargs)
        watch(model_output)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _conditional_branch(calls: list[DenoiserCall], directions: list[torch.Tensor], *, usual: int) -> int:
    """Which of two branches is the prompt's: u + g (c - u) has more of c than of u in it.

    Guidance that rescales or renormalizes changes both shares by one factor, so their order stays.
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
