# SPDX-License-Identifier: Apache-2.0
"""The ternary Scenes model of the package: draws prompts of users, and judges what it drew."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image

from ..evaluation import Scenes, contact_sheet
from ..evaluation.benchmarks import UNKNOWN, Judgement
from ..evaluation.scenes.call import scenes_call
from ..evaluation.scenes.files import JUDGE
from ..files import new_file, write_json
from ..progress import Bar
from ..rollouts import Rollouts, draw_images, prepared
from .pipeline import DATA, without_vae_type_warning


FOLDER = DATA / "scenes"
FIGURES = "figures.json"
SHOWN_PROMPTS = (  # of every task, held-out combinations
    "a photo of a teapot",
    "a photo of a cat and a rocket",
    "a photo of three keys",
    "a photo of a purple umbrella",
    "a photo of a dog right of a chair",
    "a photo of a red bell and a blue bus",
    "a red cat left of two blue keys",
    "two green turtles and a yellow star",
)
BATCH_SIZE = 16
COLUMNS = 8  # of the contact sheet


@dataclasses.dataclass(frozen=True)
class ScenesDrawing:
    """Pictures that the ternary model drew, and what the judge says of them.

    Args:
        prompts (`tuple[str, ...]`), seeds (`tuple[int, ...]`): of the pictures.
        images (`tuple[PIL.Image.Image, ...]`): 64 × 64 pixels, RGB.
        judgements (`tuple[Judgement | None, ...]`): `None` where the prompt is outside the grammar.
        seconds (`float`): wall time of drawing.
        figures (`Mapping[str, Any]`): of this model and its teacher on the benchmark's held-out prompts, as measured
            when the model was made.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[Image.Image, ...]
    judgements: tuple[Judgement | None, ...]
    seconds: float
    figures: Mapping[str, Any]

    @property
    def unread(self) -> tuple[str, ...]:
        """The prompts that nothing can score, each once."""
        pairs = zip(self.prompts, self.judgements, strict=True)
        return tuple(dict.fromkeys(prompt for prompt, judgement in pairs if judgement is None))

    def save_contact_sheet(self, path: str | os.PathLike[str]) -> None:
        """Writes the pictures under their prompts, as PNG; each says below whether it is right."""
        captions = [
            f"{prompt} ({_verdict(judgement)})"
            for prompt, judgement in zip(self.prompts, self.judgements, strict=True)
        ]
        sheets = [
            contact_sheet({"ternary": self.images[start : start + COLUMNS]}, captions[start : start + COLUMNS])
            for start in range(0, len(captions), COLUMNS)
        ]
        page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
        for index, sheet in enumerate(sheets):
            page.paste(sheet, (0, sum(other.height for other in sheets[:index])))
        with new_file(path) as temporary:
            page.save(temporary, format="PNG")

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes a list with one object per picture."""
        pictures = [
            {
                "prompt": prompt,
                "seed": seed,
                "right": None if judgement is None else bool(judgement.score),
                "reason": None if judgement is None else judgement.reason,
            }
            for prompt, seed, judgement in zip(self.prompts, self.seeds, self.judgements, strict=True)
        ]
        write_json(path, pictures, allow_nan=False)


def scenes_demo_pipeline(dtype: torch.dtype = torch.float32, *, folder: Path | None = None) -> FluxPipeline:
    """Loads the embedded text-to-image pipeline: a stock `FluxPipeline` with packed ternary layers.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of what is not packed.
        folder (`Path`, *optional*): another one, as `examples/scenes/embed_ternary.py` writes it.

    Raises:
        FileNotFoundError: if this build of the package does not carry the model.
    """
    folder = folder or FOLDER
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The ternary Scenes model is not at {folder}. Make it with examples/scenes/embed_ternary.py of the "
            "diffusers-ternary repository, or install a build that carries it."
        )
    with without_vae_type_warning():
        return FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)


def draw_scenes(
    prompts: Sequence[str] = SHOWN_PROMPTS, *, pictures: int = 1, seed: int = 0, folder: Path | None = None
) -> ScenesDrawing:
    """Draws prompts with the embedded ternary model, and judges the pictures.

    Args:
        prompts (`Sequence[str]`, *optional*): of the grammar of Scenes; others are drawn, but cannot be scored.
        pictures (`int`, *optional*, defaults to 1): of each prompt, from the seeds `seed`, `seed + 1`, ...
        seed (`int`, *optional*, defaults to 0): of the noise.
        folder (`Path`, *optional*): see [`scenes_demo_pipeline`].

    Raises:
        FileNotFoundError: if this build of the package does not carry the model.
        ValueError: for no or empty prompts.
    """
    folder = folder or FOLDER
    repeated = tuple(prompt for prompt in prompts for _ in range(pictures))
    seeds = tuple(range(seed, seed + pictures)) * len(prompts)
    pipeline = scenes_demo_pipeline(folder=folder)
    rollouts = Rollouts(repeated, seeds, scenes_call(pipeline), BATCH_SIZE)
    start = time.perf_counter()
    images: list[Image.Image] = []
    with prepared(pipeline):
        for batch in Bar(list(rollouts.batches()), "Drawing"):
            images += draw_images(pipeline, batch, rollouts.call_kwargs)
    seconds = time.perf_counter() - start
    judge = Scenes(judge=folder / JUDGE, prompts=repeated)
    judgements = tuple(
        None if tag == UNKNOWN else judge.judge(index, image)
        for index, (tag, image) in enumerate(zip(judge.tags, images, strict=True))
    )
    figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    return ScenesDrawing(repeated, seeds, tuple(images), judgements, seconds, figures)


def _verdict(judgement: Judgement | None) -> str:
    if judgement is None:
        return "cannot be scored"
    return "right" if judgement.score else judgement.reason or "wrong"
