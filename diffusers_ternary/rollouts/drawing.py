# SPDX-License-Identifier: Apache-2.0
"""One pipeline call for some prompts, each from the noise of its own seed: the only way in which prompts are drawn.

Calibration, distillation, evaluation and the demo draw with it, in evaluation mode and without a bar for every call.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn


_RESERVED = ("prompt", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict")
_PER_PROMPT = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Prompts that one pipeline call draws, each with the seed of its noise.

    The noise comes from a CPU generator with this seed, so neither batch size nor device changes it.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, batch: RolloutBatch, call_kwargs: Mapping[str, Any], output_type: str) -> Any:
    """One pipeline call, inside [`prepared`].

    Args:
        pipeline (`DiffusionPipeline`): what draws.
        batch ([`RolloutBatch`]): prompts and seeds.
        call_kwargs (`Mapping[str, Any]`): further arguments of the call.
        output_type (`str`): `"latent"`, `"pil"`, `"np"`, ...; left out for pipelines that cannot be asked.

    Returns:
        The pipeline's output.
    """
    kwargs = dict(call_kwargs)
    for name in _PER_PROMPT:
        if isinstance(kwargs.get(name), str):
            # Several pipelines do not repeat a single negative prompt over the batch.
            kwargs[name] = [kwargs[name]] * len(batch.prompts)
    if takes_output_type(pipeline):
        kwargs["output_type"] = output_type
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]
    return pipeline(prompt=list(batch.prompts), generator=generators, **kwargs)


def draw_images(pipeline: DiffusionPipeline, batch: RolloutBatch, call_kwargs: Mapping[str, Any]) -> list[Image.Image]:
    """Draws one image per prompt, inside [`prepared`].

    Returns:
        `list[PIL.Image.Image]`: RGB.

    Raises:
        ValueError: if the pipeline does not return one image per prompt.
    """
    images = getattr(draw(pipeline, batch, call_kwargs, "pil"), "images", None)
    if not isinstance(images, list) or len(images) != len(batch.prompts):
        found = f"{len(images)} images" if isinstance(images, list) else "no list of images"
        raise ValueError(
            f"{type(pipeline).__name__} returned {found} for {len(batch.prompts)} prompts. evaluate compares "
            "text-to-image pipelines."
        )
    return [image.convert("RGB") for image in images]


def takes_output_type(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline can be asked for latents instead of images."""
    return "output_type" in inspect.signature(type(pipeline).__call__).parameters


def image_size(pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels that a call asks for, or its defaults; `None` if only drawing tells."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    sides = []
    for name in ("width", "height"):
        side = call_kwargs.get(name)
        if side is None and name in parameters:
            side = parameters[name].default
        if side is None:  # most pipelines: latents of a size of their own
            latent, scale = (getattr(pipeline, part, None) for part in ("default_sample_size", "vae_scale_factor"))
            side = latent * scale if isinstance(latent, int) and isinstance(scale, int) else None
        sides.append(side)
    width, height = sides
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Checks a list of prompts.

    Raises:
        TypeError: if it is one string, or holds something else than strings.
        ValueError: if there are none, or an empty one.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} is one string. Give a list: prompts=[...].")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts={prompts!r} is not a list. Give one: prompts=[...].")
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError(
            "There are no prompts. Give some that cover what the model draws: a few to evaluate, 64 to 256 to "
            "calibrate, thousands to distill."
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{index}]={prompt!r} is not a string.")
        if not prompt.strip():
            raise ValueError(f"prompts[{index}]={prompt!r} is empty. Remove it, or write what to draw.")
    return prompts


def check_call(pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Checks arguments of the pipeline call.

    Args:
        pipeline (`DiffusionPipeline`): what is called.
        call_kwargs (`Mapping[str, Any]`): the arguments.

    Raises:
        ValueError: names those that the pipeline does not take, and those that are set for every rollout.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no prompt, so it has no rollouts.")
    fixed = [name for name in call_kwargs if name in _RESERVED]
    if fixed:
        raise ValueError(f"call_kwargs sets {', '.join(fixed)}, which is set for every rollout. Remove it there.")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [name for name in call_kwargs if name not in parameters]
    if unknown:
        known = ", ".join(name for name in parameters if name != "self")
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(unknown)}. It takes {known}.")
    return dict(call_kwargs)


@contextlib.contextmanager
def prepared(pipeline: DiffusionPipeline) -> Iterator[None]:
    """No dropout and no progress bar per call, until the block ends."""
    with _silent(pipeline), evaluation_mode(pipeline.components.values()):
        yield


@contextlib.contextmanager
def evaluation_mode(components: Iterable[Any]) -> Iterator[None]:
    """No dropout, which would make all that is measured random, until the block ends.

    Models built in memory are in training mode.

    Args:
        components (`Iterable`): what is not a module is passed over.
    """
    training = [
        module for part in components if isinstance(part, nn.Module) for module in part.modules() if module.training
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
