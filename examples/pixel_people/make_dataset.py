# SPDX-License-Identifier: Apache-2.0
"""Render the pixel-people data set: exactly labeled 16x16 portraits, split by attribute combination.

The drawings come from the avatar style ``@dicebear/pixel-art`` (design CC0-1.0, code MIT), asked for explicit parts
and colors, so that every label is exact. Parts that look alike at 16 pixels are not used.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from diffusers_ternary.demo.grammar import ATTRIBUTES, Portrait, sample_portraits


SIZE = 16
NO_LABEL = 255  # of an attribute that is not visible

HAIR = {
    "short": ("short14", "short15", "short17"),
    "long": ("long09", "long12", "long13"),
    "curly": ("short11", "long15"),
    "mohawk": ("short05", "short21"),
    "bald": (),
}
HAIR_COLORS = {
    "black": "141414",
    "brown": "a0561c",
    "blonde": "f0d040",
    "red": "e03a1a",
    "green": "22a040",
    "blue": "2860e0",
    "purple": "9a30d0",
}
SKINS = {"light": "fbdcc0", "tan": "d0945a", "dark": "432818"}
MOUTHS = {"smiling": "happy09", "laughing": "happy12", "frowning": "sad01", "serious": "sad06"}
GLASSES = {"no glasses": (), "glasses": ("light05", "light06"), "sunglasses": ("dark01", "dark03")}
HATS = {
    "no hat": (),
    "cap": ("variant02", "variant07"),
    "beanie": ("variant03", "variant04"),
    "top hat": ("variant06",),
}
CLOTHING = {"plain": "variant12", "striped": "variant13", "checked": "variant06"}
SHIRT_COLORS = {
    "red": "d42020",
    "orange": "f08020",
    "yellow": "e8c400",
    "green": "2ca02c",
    "blue": "2456d8",
    "purple": "8030b0",
    "black": "202020",
}
BACKGROUNDS = {"white": "ffffff", "gray": "9a9a9a", "green": "a6e89a", "blue": "8cc4ff", "pink": "ffb0d0"}
HAT_COLORS = ("d81b7a", "0a9a8f", "6d7fb8")  # not a hair color, so that hat and hair stay apart; never in a prompt
EYES = ("variant02", "variant09", "variant12")


def options(portrait: Portrait, rng: random.Random) -> dict[str, Any]:
    """The avatar options that draw a portrait; what no attribute decides (eyes, hat color) is drawn at random."""
    drawn: dict[str, Any] = {
        "hair": [rng.choice(HAIR[portrait.hair_style])] if portrait.hair_color else [],
        "skinColor": [SKINS[portrait.skin]],
        "mouth": [MOUTHS[portrait.expression]],
        "mouthColor": ["c01020"],
        "eyes": [rng.choice(EYES)],
        "eyesColor": ["262626"],
        "clothing": [CLOTHING[portrait.shirt_pattern]],
        "clothingColor": [SHIRT_COLORS[portrait.shirt_color]],
        "backgroundColor": [BACKGROUNDS[portrait.background]],
    }
    if portrait.hair_color:
        drawn["hairColor"] = [HAIR_COLORS[portrait.hair_color]]
    if portrait.eyewear != "no glasses":
        drawn |= {
            "glasses": [rng.choice(GLASSES[portrait.eyewear])],
            "glassesColor": ["101010"],
            "glassesProbability": 100,
        }
    if portrait.hat != "no hat":
        drawn |= {
            "hat": [rng.choice(HATS[portrait.hat])],
            "hatColor": [rng.choice(HAT_COLORS)],
            "hatProbability": 100,
        }
    return drawn


def render(all_options: Iterable[dict[str, Any]], node_folder: Path) -> Iterator[np.ndarray]:
    """Draw each set of options: yields uint8 arrays [16, 16, 3]."""
    process = subprocess.Popen(
        ["node", "render_svg.mjs"], cwd=node_folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None

    def feed() -> None:  # in a thread: writing everything before reading would fill both pipes and deadlock
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.writelines(json.dumps(one) + "\n" for one in all_options)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    for svg in process.stdout:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
        yield np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    feeder.join()
    if process.wait() != 0:
        raise RuntimeError(f"node render_svg.mjs ended with status {process.returncode}; see its message above.")


def labels_of(portrait: Portrait) -> list[int]:
    """Class indices in the order of ``ATTRIBUTES``; ``NO_LABEL`` for what is not visible."""
    visible = portrait.labels()
    return [ATTRIBUTES[name].index(visible[name]) if name in visible else NO_LABEL for name in ATTRIBUTES]


def install_node_packages(folder: Path) -> Path:
    """Put the two npm packages and the render script into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "render_svg.mjs"):
        shutil.copy(Path(__file__).parent / name, folder / name)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    return folder


def main() -> None:
    """Render the training split and the held-out split to one ``.npz`` each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.npz and held_out.npz")
    parser.add_argument("--train", type=int, default=100_000, help="number of training portraits")
    parser.add_argument("--held-out", type=int, default=6_000, help="number of held-out portraits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    node_folder = install_node_packages(arguments.output / "node")
    for split, count in (("held_out", arguments.held_out), ("train", arguments.train)):
        portraits = sample_portraits(count, arguments.seed, held_out=split == "held_out")
        rng = random.Random(f"{split} {arguments.seed}")
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        pictures = render((options(portrait, rng) for portrait in portraits), node_folder)
        for index, picture in enumerate(tqdm(pictures, total=count, desc=split, mininterval=5)):
            images[index] = picture
        labels = np.array([labels_of(portrait) for portrait in portraits], np.uint8)
        np.savez(arguments.output / f"{split}.npz", images=images, labels=labels)


if __name__ == "__main__":
    main()
