# SPDX-License-Identifier: Apache-2.0
"""What both pipelines are asked to draw, and the drawing."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from ..rollouts import RolloutBatch, batches, check_call, check_prompts, draw


_RESERVED = ("latents",)
_MAX_SEED = 2**63 - 1


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
        TypeError: if a prompt is not a string or a seed no integer.
        ValueError: if there are no prompts, an empty one, not one seed per prompt, a seed that torch does not take,
            or a batch size below 1.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call_kwargs: Mapping[str, Any]
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

    def batches(self) -> Iterator[RolloutBatch]:
        """The pipeline calls, in order."""
        return batches(self.prompts, self.seeds, self.batch_size)

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Checks that the pipeline takes the arguments; see [`check_call`]."""
        check_call(pipeline, self.call_kwargs, reserved=_RESERVED)


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
    prompts = check_prompts(prompts)
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
