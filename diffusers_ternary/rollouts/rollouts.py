# SPDX-License-Identifier: Apache-2.0
"""The pipeline's own rollouts: prompts in, denoiser calls out; nothing is decoded."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.logging import tqdm

from .drawing import RolloutBatch, batches, check_call, check_prompts, draw, prepared


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Which trajectories a pipeline runs.

    Args:
        prompts (`tuple[str, ...]`): one trajectory per prompt.
        seed (`int`): prompt i starts from the noise of a CPU generator seeded with `seed + i`, whatever the device
            and the batch size.
        batch_size (`int`): prompts per pipeline call.
        call_kwargs (`Mapping[str, Any]`): further arguments of the pipeline call (steps, guidance, size, ...); the
            pipeline's own defaults hold for the rest.
    """

    prompts: tuple[str, ...]
    seed: int
    batch_size: int
    call_kwargs: Mapping[str, Any]

    def sha256(self) -> str:
        """Hash of the prompts, in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            data = prompt.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @property
    def seeds(self) -> range:
        """One per prompt."""
        return range(self.seed, self.seed + len(self.prompts))

    def batches(self) -> Iterator[RolloutBatch]:
        """The pipeline calls, in order."""
        return batches(self.prompts, self.seeds, self.batch_size)

    def run(self, pipeline: DiffusionPipeline, *, description: str) -> None:
        """Runs all trajectories. What happens inside is observed by hooks."""
        with prepared(pipeline):
            for batch in tqdm(list(self.batches()), desc=description, leave=False):
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
    """Checks what the user gave.

    Raises:
        TypeError, ValueError: see [`check_prompts`] and [`check_call`].
    """
    return Rollouts(check_prompts(prompts), seed, batch_size, check_call(pipeline, call_kwargs or {}))
