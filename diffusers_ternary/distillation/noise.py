# SPDX-License-Identifier: Apache-2.0
"""From clean latents to the noisy ones that the denoiser is trained on, exactly as the pipeline would make them.

Two families, told apart by the scheduler:

- flow matching (the model predicts noise - x0):   x_t = (1 - sigma) x0 + sigma e, sigma in (0, 1];
- variance preserving (epsilon, v or sample prediction):   x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e, t in 0..T-1.
  Schedulers that integrate in sigma (Euler) rescale their states to exactly this before the model sees them.

How a noise level becomes the timestep that the denoiser receives is the pipeline's own affair (Flux divides by 1000,
Lumina counts backwards): it is measured on one rollout.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..rollouts import RolloutBatch, Rollouts, prepared, recorded_calls


FLOW = "flow"
VARIANCE_PRESERVING = "variance_preserving"
# Pipelines may cast timesteps to bfloat16 (8 bits) before the denoiser sees them.
_TOLERANCE = 2**-7
_SMALLEST_LEVEL = 1e-3
FEW_STEPS = 4
_SHIFTS = (0.1, 20.0)  # beyond these, a schedule is none of the shifted family


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise levels of one rollout.

    Args:
        levels (`tuple[float, ...]`): per step, sigma or t, by family.
        timesteps (`tuple[float, ...]`): per step, as the denoiser received them.
    """

    levels: tuple[float, ...]
    timesteps: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class NoiseProcess:
    """Noise levels, their distribution and their timesteps.

    Args:
        family (`str`): `"flow"` or `"variance_preserving"`.
        schedule ([`Schedule`]): what the pipeline itself visits.
        alphas (`torch.Tensor`, *optional*): float32 `[T]`, cumulated; variance preserving only.
        uniform_fraction (`float`): share of uniform levels; the rest is logit-normal.
        on_schedule (`bool`): draw the pipeline's own levels only.
    """

    family: str
    schedule: Schedule
    alphas: torch.Tensor | None = None
    uniform_fraction: float = 0.2
    on_schedule: bool = False

    def draw_levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random noise levels float32 `[count]`."""
        if self.on_schedule:
            index = torch.randint(len(self.schedule.levels), (count,), generator=generator)
            return torch.tensor(self.schedule.levels, dtype=torch.float32)[index]
        position = torch.sigmoid(torch.randn(count, generator=generator))
        uniform = torch.rand(count, generator=generator)
        position = torch.where(torch.rand(count, generator=generator) < self.uniform_fraction, uniform, position)
        if self.alphas is not None:
            return (position * len(self.alphas)).floor().clamp(0, len(self.alphas) - 1)
        # Trained where the pipeline's shifted schedule goes, as the teacher was (Esser et al., arXiv 2403.03206).
        shift = self.shift
        return (shift * position / (1 + (shift - 1) * position)).clamp(_SMALLEST_LEVEL, 1.0)

    @property
    def shift(self) -> float:
        """By how much the pipeline's schedule is shifted, which resolution-dependent ones decide while they run.

        The shift s maps u to s u / (1 + (s - 1) u), and so multiplies the odds u / (1 - u) by s. Step i of a plain
        schedule is at u = 1 - c i, c near 1 / n: the odds are (s / c) / i - s, a line in 1 / i.
        """
        levels = torch.tensor(self.schedule.levels[1:], dtype=torch.float64)
        if len(levels) < 2 or not bool(((levels > 0) & (levels < 1)).all()):
            return 1.0
        odds, inverse = levels / (1 - levels), 1 / torch.arange(1, len(levels) + 1, dtype=torch.float64)
        centered = inverse - inverse.mean()
        slope = (centered * odds).sum() / centered.square().sum()
        return min(max(float(slope * inverse.mean() - odds.mean()), _SHIFTS[0]), _SHIFTS[1])

    def mix(self, sample: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """x_t float32 `[B, ...]` of clean latents and noise at the levels `[B]`."""
        if self.alphas is not None:
            alphas = self.alphas.to(levels.device)[levels.long()]
            signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        else:
            signal, spread = 1 - levels, levels
        shape = (-1, *(1,) * (sample.dim() - 1))
        return signal.view(shape) * sample + spread.view(shape) * noise

    def timesteps(self, levels: torch.Tensor) -> torch.Tensor:
        """What the denoiser receives at the levels `[B]`: the affine map that the rollout showed."""
        first, last = self.schedule.levels[0], self.schedule.levels[-1]
        start, end = self.schedule.timesteps[0], self.schedule.timesteps[-1]
        if first == last:
            return levels * (start / first)
        return start + (levels - first) * ((end - start) / (last - first))


def noise_process(
    scheduler: Any, received: Sequence[float], *, timesteps: str = "auto", uniform_fraction: float = 0.2
) -> NoiseProcess:
    """Reads the noise process off a scheduler that has just run.

    Args:
        scheduler: of the pipeline, with the timesteps of the run still set.
        received (`Sequence[float]`): the timesteps that the denoiser was given, step by step.
        timesteps (`str`): see [`DistillConfig`].
        uniform_fraction (`float`): see [`DistillConfig`].

    Raises:
        ValueError: for a scheduler of neither family, one whose steps cannot be matched with the denoiser's, or a
            pipeline that changes timesteps in a way that is not affine.
    """
    name, config = type(scheduler).__name__, dict(scheduler.config)
    prediction = config.get("prediction_type", "epsilon")
    flow = name.startswith("FlowMatch") or prediction == "flow_prediction" or config.get("use_flow_sigmas", False)
    alphas: torch.Tensor | None = None if flow else getattr(scheduler, "alphas_cumprod", None)
    if not flow and (alphas is None or prediction not in ("epsilon", "v_prediction", "sample")):
        raise ValueError(
            f"{name} (prediction_type={prediction!r}) is neither flow matching nor a variance-preserving process. "
            "Give the pipeline a scheduler of one of these families, e.g. FlowMatchEulerDiscreteScheduler or "
            "DDIMScheduler."
        )
    visited = [float(step) for step in scheduler.timesteps]
    levels = [float(sigma) for sigma in scheduler.sigmas[: len(visited)]] if flow else visited
    # Schedulers of higher order visit a level twice in a row; so does the denoiser.
    levels = [level for i, level in enumerate(levels) if i == 0 or visited[i] != visited[i - 1]]
    if len(levels) != len(received):
        raise ValueError(
            f"{name} has {len(levels)} noise levels, but the denoiser was called at {len(received)} timesteps. Pass "
            "call_kwargs that run the whole schedule."
        )
    process = NoiseProcess(
        family=FLOW if flow else VARIANCE_PRESERVING,
        schedule=Schedule(tuple(levels), tuple(received)),
        alphas=None if alphas is None else alphas.float().cpu(),
        uniform_fraction=uniform_fraction,
        on_schedule=timesteps == "schedule" or (timesteps == "auto" and len(levels) <= FEW_STEPS),
    )
    expected = process.timesteps(torch.tensor(levels))
    error = (expected - torch.tensor(list(received))).abs().max() / expected.abs().max()
    if not error <= _TOLERANCE:
        raise ValueError(
            f"The timesteps {[round(t, 4) for t in received]} that the denoiser receives are not an affine function "
            f"of the noise levels {[round(level, 4) for level in levels]} of {name}: this pipeline cannot be "
            "distilled."
        )
    return process


def observe_noise(
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    rollouts: Rollouts,
    *,
    timesteps: str = "auto",
    uniform_fraction: float = 0.2,
) -> NoiseProcess:
    """The noise process of a pipeline, from the trajectory of its first prompt.

    Args:
        pipeline (`DiffusionPipeline`): run once.
        denoiser (`nn.Module`): of the pipeline.
        rollouts ([`Rollouts`]): prompts and call arguments.
        timesteps (`str`), uniform_fraction (`float`): see [`DistillConfig`].

    Raises:
        ValueError: see [`noise_process`].
    """
    with prepared(pipeline), recorded_calls(denoiser) as calls:
        rollouts.draw(pipeline, RolloutBatch(rollouts.prompts[:1], (rollouts.seed,)))
    received = {call.step: call.timestep for call in calls}
    return noise_process(
        pipeline.scheduler,
        [received[step] for step in sorted(received)],
        timesteps=timesteps,
        uniform_fraction=uniform_fraction,
    )
