# SPDX-License-Identifier: Apache-2.0
"""What each layer's candidates do to the denoiser's output, one layer at a time, on recorded calls of the teacher.

Of a text encoder: to the embeddings that the denoiser is given.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..progress import Bar
from ..rollouts import DenoiserCall, Rollouts, normalized_error, prepared, recorded_calls
from ..ternarize import quantize_int8
from .candidates import Candidate
from .config import SensitivityConfig
from .encoders import EncoderRollouts, EncoderStates
from .run import CalibrationRun
from .solver import SolvedLayer


@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """Recorded calls of a float denoiser that no statistics were taken from.

    Args:
        name (`str`): prompts and steps that were asked for, to tell the states of several settings apart.
        calls (`tuple[DenoiserCall, ...]`): on the CPU.
    """

    measured: ClassVar[str] = "the denoiser's output"

    name: str
    calls: tuple[DenoiserCall, ...]

    @torch.no_grad()
    def error(self, denoiser: nn.Module) -> float:
        """mean |v - v_teacher|² / mean |v_teacher|² of the denoiser as it is now."""
        return normalized_error((call.replay(denoiser), call.output) for call in self.calls)


def record_states(
    pipeline: DiffusionPipeline, component: str, rollouts: Rollouts, settings: SensitivityConfig
) -> TeacherStates | EncoderStates:
    """Runs the first prompts of the calibration with other noise, and keeps a few steps of each.

    Raises:
        ValueError: if the denoiser is called without a timestep, or its output is not finite.
    """
    held = dataclasses.replace(
        rollouts,
        prompts=rollouts.prompts[: settings.prompts],
        seeds=tuple(seed + len(rollouts.prompts) for seed in rollouts.seeds[: settings.prompts]),
    )
    name = f"{settings.prompts}x{settings.steps}"
    kept: list[DenoiserCall] = []
    with prepared(pipeline):
        if isinstance(held, EncoderRollouts):
            return EncoderStates.record(name, pipeline, held)
        for batch in held.batches():
            with recorded_calls(pipeline.components[component]) as calls:
                held.draw(pipeline, batch)
            count = calls[-1].step + 1 if calls else 0
            steps = {math.floor((i + 0.5) * count / settings.steps) for i in range(settings.steps)}
            kept += [call for call in calls if call.step in steps]
    for call in kept:
        if not bool(torch.isfinite(call.output).all()):
            raise ValueError(
                f"{component}: its own output holds NaN or Inf at step {call.step} (timestep {call.timestep:g}). Load "
                "the pipeline in bfloat16 or float32 instead of float16, and check that it draws images."
            )
    return TeacherStates(name, tuple(kept))


def measure_sensitivities(run: CalibrationRun, states: TeacherStates | EncoderStates) -> None:
    """Puts every candidate of every layer into the float model alone, and replays the calls.

    Nothing is changed afterward. Finished layers are stored, and taken from there by a rerun.

    Args:
        run ([`CalibrationRun`]): with its candidates solved; gets the `sensitivities`.
        states ([`TeacherStates`] or [`EncoderStates`]): of its model.

    Raises:
        ValueError: if an output is not finite.
    """
    with prepared(run.pipeline):
        for name, candidates in Bar(run.candidates.items(), f"Sensitivity of {run.component}"):
            key = f"{run.component}.{name}@sensitivity-{states.name}"
            known = run.store.load_numbers(key)
            for candidate in candidates:
                if candidate.label in known:
                    continue
                with _substituted(run.model, name, candidate, run.solved[name].get(candidate)):
                    # A kept layer changes nothing.
                    error = 0.0 if candidate.kind == "keep" else states.error(run.model)
                if not math.isfinite(error):
                    raise ValueError(
                        f"{run.component}.{name}: with {candidate.label} weights {states.measured} holds NaN or "
                        "Inf. Load the pipeline in bfloat16 or float32 instead of float16, or keep the layer."
                    )
                known[candidate.label] = error
            run.store.save_numbers(key, known)
            run.sensitivities[name] = {candidate: known[candidate.label] for candidate in candidates}
    run.pipeline.maybe_free_model_hooks()  # an offloaded denoiser goes back to where it was


def whole_errors(pipeline: DiffusionPipeline, states: Mapping[str, TeacherStates | EncoderStates]) -> dict[str, float]:
    """The error of each model as it is now, all its layers together."""
    with prepared(pipeline):
        errors = {component: held.error(pipeline.components[component]) for component, held in states.items()}
    pipeline.maybe_free_model_hooks()
    return errors


@contextlib.contextmanager
def _substituted(denoiser: nn.Module, name: str, candidate: Candidate, solved: SolvedLayer | None) -> Iterator[None]:
    """The denoiser with the weight and bias of one candidate in one layer, until the block ends."""
    module: Any = denoiser.get_submodule(name)
    weight, bias = module.weight.data, None if module.bias is None else module.bias.data
    try:
        if candidate.kind == "int8":
            module.weight.data = quantize_int8(weight.flatten(1), name=name).dequantize(weight.dtype).view_as(weight)
        elif solved is not None:
            module.weight.data = solved.weight.to(weight.device).dequantize(weight.dtype).view_as(weight)
            if bias is not None:
                module.bias.data = solved.bias(bias)
        yield
    finally:
        module.weight.data = weight
        if bias is not None:
            module.bias.data = bias
