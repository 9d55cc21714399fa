# SPDX-License-Identifier: Apache-2.0
"""What a pipeline is asked to draw, each prompt from the noise of its own seed: prompts in, denoiser calls out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..progress import Bar
from .drawing import RolloutBatch, check_call, check_prompts, draw, prepared
from .fingerprint import prompts_sha256


_MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Which trajectories a pipeline runs.

    Args:
        prompts (`tuple[str, ...]`): one trajectory per prompt.
        seeds (`tuple[int, ...]`): one per prompt, of the CPU generator of its noise, so that neither batch
            size nor device changes it.
        call_kwargs (`Mapping[str, Any]`, *optional*): further arguments of the pipeline call (steps, guidance, size,
            ...); the pipeline's own defaults hold for the rest.
        batch_size (`int`, *optional*, defaults to 1): prompts per pipeline call.

    Raises:
        TypeError: if a prompt is not a string, or a seed not an integer.
        ValueError: if there are no prompts, an empty one, not one seed per prompt, a seed that torch does not take,
            or a batch size below 1.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if len(self.seeds) != len(self.prompts):
            raise ValueError(
                f"{len(self.seeds)} seeds for {len(self.prompts)} prompts. Give one seed per prompt, or seed= for "
                "consecutive ones."
            )
        for seed in self.seeds:
            if not isinstance(seed, int) or isinstance(seed, bool):
                raise TypeError(f"The seed {seed!r} is not an integer.")
            if not 0 <= seed <= _MAX_SEED:
                raise ValueError(f"The seed {seed} is not between 0 and {_MAX_SEED}.")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} is not a positive integer.")

    def sha256(self) -> str:
        """Hash of the prompts, in order."""
        return prompts_sha256(self.prompts)

    @property
    def seed(self) -> int:
        """Of the first prompt."""
        return self.seeds[0]

    def first(self, count: int) -> "Rollouts":
        """The trajectories of the first `count` prompts."""
        return dataclasses.replace(self, prompts=self.prompts[:count], seeds=self.seeds[:count])

    def batches(self) -> Iterator[RolloutBatch]:
        """The pipeline calls, in order."""
        for start in range(0, len(self.prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield RolloutBatch(self.prompts[part], self.seeds[part])

    def run(self, pipeline: DiffusionPipeline, *, description: str) -> None:
        """Runs all trajectories. What happens inside is observed by hooks."""
        with prepared(pipeline):
            for batch in Bar(list(self.batches()), description):
                self.draw(pipeline, batch)

    def draw(self, pipeline: DiffusionPipeline, batch: RolloutBatch) -> Any:
        """One pipeline call, inside [`prepared`].

        Returns:
            The clean latents, if the pipeline can return them; else what it draws.
        """
        return draw(pipeline, batch, self.call_kwargs, "latent")[0]  # decoding is not a part of the denoiser


def make_rollouts(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    call_kwargs: Mapping[str, Any] | None,
) -> Rollouts:
    """Checks what the user gave. Prompt i starts from the noise of `seed + i`.

    Raises:
        TypeError, ValueError: see [`Rollouts`] and [`check_call`].
    """
    prompts = check_prompts(prompts)
    seeds = tuple(range(seed, seed + len(prompts)))
    return Rollouts(prompts, seeds, check_call(pipeline, call_kwargs or {}), batch_size)
