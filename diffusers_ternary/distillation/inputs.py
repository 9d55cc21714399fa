# SPDX-License-Identifier: Apache-2.0
"""From the teacher's data to the denoiser's inputs: noise, timesteps, guidance, and which rows come at which step.

Everything random is a function of (seed, step, forward, process) alone. A resumed run needs no state of a generator:
the number of the step is its position in the data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .cache import TeacherCache
from .config import DistillConfig
from .loss import DenoiserInputs
from .noise import NoiseProcess
from .online import TeacherPool


# Weyl constants keep neighboring seeds, steps and processes apart; torch mixes the sum.
_SEED_STRIDES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xAEF17502108EF2D9, 0x94D049BB133111EB)

TeacherData: TypeAlias = TeacherCache | TeacherPool


@dataclasses.dataclass(frozen=True)
class InputMaker:
    """Makes training inputs.

    Args:
        data ([`TeacherData`]): clean latents, embeddings, rollout states.
        noise ([`NoiseProcess`]): of the pipeline.
        config ([`DistillConfig`]): shares of rollout states, dropped prompts, ...
        random_guidance (`bool`): whether the denoiser takes a guidance input that is to be drawn.
        process (`int`), processes (`int`): which of the processes this is.
    """

    data: TeacherData
    noise: NoiseProcess
    config: DistillConfig
    random_guidance: bool
    process: int = 0
    processes: int = 1

    def make(self, step: int, forward: int) -> DenoiserInputs:
        """Inputs of one forward of this process, on the CPU."""
        generator = seeded(self.config.seed, step, forward, self.process)
        rows = self.config.batch_size
        # All processes walk through one shuffled list, side by side.
        place = (step * self.config.gradient_accumulation_steps + forward) * self.processes + self.process
        batch = self.data.batch(self._indices(place * rows, rows), generator)
        levels = self.noise.draw_levels(rows, generator)
        noise = torch.randn(batch.sample.shape, generator=generator)
        sample = self.noise.mix(batch.sample, noise, levels)
        timestep = self.noise.timesteps(levels)
        chosen = torch.rand(rows, generator=generator) < self.config.rollout_fraction
        dropped = torch.rand(rows, generator=generator) < self.config.cfg_dropout
        if batch.rollout is not None:
            state, state_timestep = batch.rollout
            sample = choose_rows(chosen, state.float(), sample)
            timestep = torch.where(chosen, state_timestep.float(), timestep)
        conditioning = dict(batch.conditioning)
        if batch.null_conditioning is not None:
            conditioning = _replace_rows(conditioning, batch.null_conditioning, dropped)
        if self.random_guidance and isinstance(conditioning.get("guidance"), torch.Tensor):
            low, high = self.config.guidance_range
            guidance = low + (high - low) * torch.rand(rows, generator=generator)
            conditioning["guidance"] = guidance.to(conditioning["guidance"].dtype)
        return DenoiserInputs(sample, timestep, conditioning, batch.listed)

    def _indices(self, start: int, count: int) -> list[int]:
        size = len(self.data)
        epochs = range(start // size, (start + count - 1) // size + 1)
        orders = {e: torch.randperm(size, generator=seeded(self.config.seed, -2 - e)).tolist() for e in epochs}
        return [orders[position // size][position % size] for position in range(start, start + count)]


def held_out_inputs(data: TeacherData, noise: NoiseProcess, indices: Sequence[int], *, draw: int) -> DenoiserInputs:
    """Inputs for the held-out evaluation: the same in every run.

    States of the teacher's own trajectories where there are any, else noised latents.

    Args:
        data ([`TeacherData`]): of prompts that are not trained on.
        noise ([`NoiseProcess`]): of the pipeline.
        indices (`Sequence[int]`): rows.
        draw (`int`): which random state of each row.
    """
    generator = seeded(0, draw, indices[0], 0)
    batch = data.batch(indices, generator)
    if batch.rollout is not None:
        sample, timestep = batch.rollout
        return DenoiserInputs(sample.float(), timestep.float(), batch.conditioning, batch.listed)
    levels = noise.draw_levels(len(indices), generator)
    sample = noise.mix(batch.sample, torch.randn(batch.sample.shape, generator=generator), levels)
    return DenoiserInputs(sample, noise.timesteps(levels), batch.conditioning, batch.listed)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for up to four numbers; neighbors give unrelated streams."""
    mixed = sum((number + 1) * stride for number, stride in zip(numbers, _SEED_STRIDES, strict=False))
    return torch.Generator().manual_seed(mixed % 2**63)


def choose_rows(chosen: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rows of `first` where `chosen` `[B]`, else of `second`."""
    return torch.where(chosen.view(-1, *(1,) * (first.dim() - 1)), first, second)


def _replace_rows(conditioning: Mapping[str, Any], null: Mapping[str, Any], dropped: torch.Tensor) -> dict[str, Any]:
    """Conditioning with the null branch's rows where `dropped`; what the branches share stays."""
    rows = len(dropped)
    flags = dropped.tolist()

    def merge(name: str, own: Any, other: Any) -> Any:
        if isinstance(own, dict) and isinstance(other, dict):
            return {key: merge(f"{name}.{key}", own[key], other[key]) for key in own}
        if isinstance(own, list) and isinstance(other, list) and len(own) == len(other) == rows:
            return [b if flag else a for a, b, flag in zip(own, other, flags, strict=True)]
        if not isinstance(own, torch.Tensor) or not isinstance(other, torch.Tensor) or own is other:
            return own
        if own.shape == other.shape:
            shared = own.dim() == 0 or len(own) != rows or torch.equal(own, other)
            return own if shared else choose_rows(dropped, other, own)
        raise ValueError(
            f"{name} has shape {list(own.shape)} with the prompts and {list(other.shape)} without: rows cannot be "
            "exchanged. Let the pipeline pad to a fixed length, or set cfg_dropout=0."
        )

    return {name: merge(name, value, null.get(name)) for name, value in conditioning.items()}
