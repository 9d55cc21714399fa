# SPDX-License-Identifier: Apache-2.0
"""Turn icons of the npm package ``@iconify-json/fluent-emoji-high-contrast`` into the masks in ``sprites.npz``.

Needs npm and ``resvg-py``. The result is in the repository; run this again only to change the classes or the sizes.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw

from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES


PACKAGE = "@iconify-json/fluent-emoji-high-contrast@1.2.6"  # license MIT, Microsoft Corporation
SIZES = (16, 18, 20)  # pixels of the longer side
RASTER = 192  # pixels; an icon has 32 units
ICONS = {  # where the icon is not called like the class
    "car": "automobile",
    "boat": "sailboat",
    "shoe": "high-heeled-shoe",
    "hat": "top-hat",
    "tree": "evergreen-tree",
    "heart": "red-heart",
    "moon": "crescent-moon",
    "leaf": "maple-leaf",
}


def read_icons() -> dict[str, str]:
    """Download the package with npm: the SVG body of every icon by its name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        subprocess.run(["tar", "xzf", archive.name, "package/icons.json"], cwd=folder, check=True)
        icons = json.loads((Path(folder) / "package" / "icons.json").read_text())["icons"]
    return {name: icon["body"] for name, icon in icons.items()}


def silhouette(body: str) -> Image.Image:
    """The filled outline of an icon, cropped: black and white, at ``RASTER`` pixels per 32 units."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g fill="black">{body}</g></svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RASTER, height=RASTER))
    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[..., 3] > 127
    picture = Image.fromarray(np.pad(drawn, 1).astype(np.uint8) * 255).copy()
    ImageDraw.floodfill(picture, (0, 0), 128)  # 128: outside; what is not outside belongs to the object
    filled = Image.fromarray((np.asarray(picture) != 128).astype(np.uint8) * 255)
    return filled.crop(filled.getbbox())


def resample(picture: Image.Image, size: int) -> np.ndarray:
    """Coverage in [0, 255] of a silhouette whose longer side becomes ``size`` pixels: uint8 [height, width]."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def main() -> None:
    """Write masks uint8 [classes, sizes, 20, 20] (top left aligned) and their extents [classes, sizes, 2] (w, h)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("sprites.npz"))
    arguments = parser.parse_args()
    icons = read_icons()
    masks = np.zeros((len(CLASSES), len(SIZES), max(SIZES), max(SIZES)), np.uint8)
    extents = np.zeros((len(CLASSES), len(SIZES), 2), np.uint8)
    for c, name in enumerate(CLASSES):
        picture = silhouette(icons[ICONS.get(name, name)])
        for s, size in enumerate(SIZES):
            mask = resample(picture, size)
            masks[c, s, : mask.shape[0], : mask.shape[1]] = mask
            extents[c, s] = mask.shape[1], mask.shape[0]
    np.savez_compressed(arguments.output, classes=np.array(CLASSES), sizes=SIZES, masks=masks, extents=extents)


if __name__ == "__main__":
    main()
