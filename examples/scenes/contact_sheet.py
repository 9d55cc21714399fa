# SPDX-License-Identifier: Apache-2.0
"""A sheet of drawn scenes with their captions, for a person to read."""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from renderer import Renderer, Sprites, layout_of

from diffusers_ternary.evaluation.geneval import TASKS
from diffusers_ternary.evaluation.scenes.prompts import COMPOSED, training_task


SCALE = 2
TEXT = 40  # pixels below a picture


def sheet(pictures: torch.Tensor, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Pictures [n, 3, h, w] in [-1, 1] above their captions, ``columns`` in a row."""
    side = pictures.shape[-1] * SCALE
    rows = -(-len(captions) // columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (side + TEXT)), "white")
    pen = ImageDraw.Draw(page)
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, (value, text) in enumerate(zip(values, captions, strict=True)):
        x, y = index % columns * (side + 8), index // columns * (side + TEXT)
        page.paste(Image.fromarray(value).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for line, words in enumerate(textwrap.wrap(text, 22)[:3]):
            pen.text((x + 2, y + side + 1 + 12 * line), words, fill="black")
    return page


def main() -> None:
    """Draw some training scenes of every task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--count", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    tags = (*TASKS, COMPOSED, COMPOSED)
    tasks = [training_task(tags[index % len(tags)], rng) for index in range(arguments.count)]
    sprites = Sprites()
    pictures = Renderer(sprites).draw(layout_of(tasks, sprites, rng, training=True))
    sheet(pictures, [task.prompt for task in tasks]).save(arguments.output)


if __name__ == "__main__":
    main()
