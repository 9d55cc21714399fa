# SPDX-License-Identifier: Apache-2.0
"""What both pipelines are asked to draw, and the drawing."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image


# Set by the evaluation itself, for every image.
_RESERVED = ("prompt", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict")
_PER_PROMPT = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
_MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that one pipeline call draws, each with its own seed."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Prompts, seeds and the arguments of the pipeline calls. One image per prompt.

    Args:
        prompts (`tuple[str, ...]`): one per image.
        seeds (`tuple[int, ...]`): one per image. Image noise comes from a CPU generator with this seed, so neither
            batch size nor device changes it.
        call_kwargs (`Mapping[str, Any]`): further arguments of the pipeline call (steps, guidance, size, ...).
        batch_size (`int`): images per pipeline call.

    Raises:
        TypeError: if a prompt is no string or a seed no integer.
        ValueError: if there are no prompts, an empty one, not one seed per prompt, a seed that torch does not take,
            a batch size below 1, or an argument that the evaluation sets itself.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call_kwargs: Mapping[str, Any]
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("There are no prompts. Give at least one.")
        for index, prompt in enumerate(self.prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{index}]={prompt!r} is not a string.")
            if not prompt.strip():
                raise ValueError(f"prompts[{index}]={prompt!r} is empty. Remove it, or write what to draw.")
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
        reserved = [name for name in self.call_kwargs if name in _RESERVED]
        if reserved:
            raise ValueError(f"call_kwargs sets {', '.join(reserved)}, which evaluate sets itself. Remove it there.")

    def batches(self) -> Iterator[Batch]:
        """The pipeline calls, in order."""
        for start in range(0, len(self.prompts), self.batch_size):
            stop = start + self.batch_size
            yield Batch(self.prompts[start:stop], self.seeds[start:stop])


def make_sampling(
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 1,
) -> Sampling:
    """Collects the arguments of [`evaluate`] that concern drawing; see there."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} is one string. Give a list: prompts=[...].")
    prompts = tuple(prompts)
    merged = dict(call_kwargs or {})
    for name, value in (("num_inference_steps", num_inference_steps), ("guidance_scale", guidance_scale)):
        if value is None:
            continue
        if name in merged:
            raise ValueError(f"{name} is given twice: {value} and, in call_kwargs, {merged[name]}. Give it once.")
        merged[name] = value
    if seeds is None:
        seeds = [seed + index for index in range(len(prompts))]
    return Sampling(prompts, tuple(seeds), merged, batch_size)


def check_call(pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> None:
    """Checks that the pipeline takes the arguments.

    Raises:
        ValueError: names those it does not take.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in call_kwargs if name not in parameters]
    if unknown:
        known = ", ".join(name for name in parameters if name != "self")
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(unknown)}. It takes {known}.")


def draw(pipeline: DiffusionPipeline, batch: Batch, call_kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """Draws one image per prompt.

    Returns:
        `list[PIL.Image.Image]`: RGB.

    Raises:
        ValueError: if the pipeline does not return one image per prompt.
    """
    kwargs = dict(call_kwargs)
    for name in _PER_PROMPT:
        if isinstance(kwargs.get(name), str):
            # Several pipelines do not repeat a single negative prompt over the batch.
            kwargs[name] = [kwargs[name]] * len(batch.prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]
    output = pipeline(prompt=list(batch.prompts), generator=generators, output_type="pil", **kwargs)
    images = getattr(output, "images", None)
    if not isinstance(images, list) or len(images) != len(batch.prompts):
        found = f"{len(images)} images" if isinstance(images, list) else "no list of images"
        raise ValueError(
            f"{type(pipeline).__name__} returned {found} for {len(batch.prompts)} prompts. evaluate compares "
            "text-to-image pipelines."
        )
    return [image.convert("RGB") for image in images]


@contextlib.contextmanager
def silent(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hides the pipeline's own progress bar (one per call), and gives its setting back."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**(before or {}))
