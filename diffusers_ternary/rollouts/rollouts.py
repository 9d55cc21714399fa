# SPDX-License-Identifier: Apache-2.0
"""The pipeline's own rollouts: prompts in, denoiser calls out; nothing is decoded."""

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import tqdm
from torch import nn


_RESERVED = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")
_PER_PROMPT = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Prompts that one pipeline call draws, each with the seed of its noise."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


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

    def batches(self) -> Iterator[RolloutBatch]:
        """The pipeline calls, in order."""
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[start : start + self.batch_size]
            yield RolloutBatch(prompts, tuple(self.seed + start + i for i in range(len(prompts))))

    def run(self, pipeline: DiffusionPipeline, *, description: str) -> None:
        """Runs all trajectories. What happens inside is observed by hooks."""
        batches = list(self.batches())
        with prepared(pipeline):
            for batch in tqdm(batches, desc=description, leave=False):
                self.draw(pipeline, batch)

    @torch.no_grad()
    def draw(self, pipeline: DiffusionPipeline, batch: RolloutBatch) -> Any:
        """One pipeline call, inside [`prepared`].

        Returns:
            The clean latents, if the pipeline can return them; else what it draws.
        """
        kwargs = dict(self.call_kwargs)
        for name in _PER_PROMPT:
            if isinstance(kwargs.get(name), str):
                # Several pipelines do not repeat a single negative prompt over the batch.
                kwargs[name] = [kwargs[name]] * len(batch.prompts)
        if returns_latents(pipeline):
            kwargs["output_type"] = "latent"  # decoding is no part of the denoiser
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]
        return pipeline(prompt=list(batch.prompts), generator=generators, **kwargs)[0]


def returns_latents(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline can be asked for latents."""
    return "output_type" in inspect.signature(type(pipeline).__call__).parameters


@contextlib.contextmanager
def prepared(pipeline: DiffusionPipeline) -> Iterator[None]:
    """No dropout and no progress bar per call, until the block ends."""
    with _silent(pipeline), _evaluation_mode(pipeline):
        yield


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
        TypeError: if `prompts` is one string, or holds something else than strings.
        ValueError: if there are no prompts, an empty one, or arguments that the pipeline does not take.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} is one string. Give a list: prompts=[...].")
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError(
            "There are no prompts. Give some that cover what the model draws: 64 to 256 to calibrate, thousands to "
            "distill."
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{index}]={prompt!r} is not a string.")
        if not prompt.strip():
            raise ValueError(f"prompts[{index}]={prompt!r} is empty. Remove it, or write what to draw.")
    kwargs = dict(call_kwargs or {})
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no prompt, so it has no rollouts.")
    reserved = [name for name in kwargs if name in _RESERVED]
    if reserved:
        raise ValueError(f"call_kwargs sets {', '.join(reserved)}, which is set for every rollout. Remove it there.")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [name for name in kwargs if name not in parameters]
    if unknown:
        known = ", ".join(name for name in parameters if name != "self")
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(unknown)}. It takes {known}.")
    return Rollouts(prompts, seed, batch_size, kwargs)


@contextlib.contextmanager
def _evaluation_mode(pipeline: DiffusionPipeline) -> Iterator[None]:
    """No dropout: it would make the statistics random. Models built in memory are in training mode."""
    training = [
        module
        for part in pipeline.components.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _silent(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hides the pipeline's own progress bar (one per call), and gives its setting back."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipeline._progress_bar_config = before if before is not None else {}
