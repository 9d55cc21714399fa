# SPDX-License-Identifier: Apache-2.0
"""The judge of Scenes: a small one-stage detector that names, colors and boxes the objects of a 64 x 64 picture.

Anchor-free with center sampling (FCOS, arXiv:1904.01355): every cell of a 16 x 16 grid says whether an object is
centered on it, and which; greedy non-maximum suppression keeps one box per object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ..geneval import SCORE_THRESHOLD, Detection
from .vocabulary import CLASSES, COLORS


CANVAS = 64  # pixels
STRIDE = 4  # pixels of the picture per cell
BOX_UNIT = 16.0  # pixels; distances to the sides are predicted in it
_OVERLAP = 0.4  # intersection over union from which two boxes are one object


class _Residual(nn.Module):
    """Two convolutions around a shortcut; the second may look further."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of the same shape."""
        return x + self.second(nn.functional.silu(self.first(self.norm(x))))


class Detector(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] to a grid of predictions.

    Args:
        width: Channels at stride 4.
    """

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(32, width, 5, stride=2, padding=2),
            *(_Residual(width, dilation) for dilation in (1, 2, 1, 2)),
            nn.GroupNorm(8, width),
            nn.SiLU(),
        )
        self.parts = (1, 4, len(CLASSES), len(COLORS))
        self.head = nn.Conv2d(width, sum(self.parts), 1)
        bias = torch.zeros(sum(self.parts))
        bias[0] = -4.0  # an object is rare; FCOS and RetinaNet start so
        self.head.bias = nn.Parameter(bias)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of an object [B, 1, 16, 16], boxes in pixels [B, 4, 16, 16], logits of classes and of colors."""
        presence, sides, kinds, colors = self.head(self.features(pictures)).float().split(self.parts, 1)
        centers = cell_centers(pictures.device, pictures.shape[-1] // STRIDE)
        near, far = centers - BOX_UNIT * sides[:, :2], centers + BOX_UNIT * sides[:, 2:]
        return presence, torch.cat((near, far), 1), kinds, colors

    @torch.no_grad()
    def detect(self, pictures: torch.Tensor) -> list[list[Detection]]:
        """The objects of each picture, surest first.

        Args:
            pictures: float [B, 3, 64, 64] in [-1, 1].
        """
        presence, boxes, kinds, colors = self(pictures)
        probability, kind = kinds.softmax(1).max(1)  # [B, 16, 16]
        scores = (presence.sigmoid()[:, 0] * probability).flatten(1).cpu()
        kind, color = kind.flatten(1).cpu(), colors.argmax(1).flatten(1).cpu()
        boxes = boxes.flatten(2).transpose(1, 2).cpu()  # [B, cells, 4]
        found = []
        for index in range(len(pictures)):
            kept: list[Detection] = []
            for cell in scores[index].argsort(descending=True).tolist():
                score = scores[index, cell].item()
                if score <= SCORE_THRESHOLD:
                    break
                left, top, right, bottom = boxes[index, cell].tolist()
                box = (left, top, right, bottom)
                if all(overlap(box, other.box) < _OVERLAP for other in kept):
                    name, hue = CLASSES[int(kind[index, cell])], tuple(COLORS)[int(color[index, cell])]
                    kept.append(Detection(name, score, box, hue))
            found.append(kept)
        return found

    @classmethod
    def from_file(cls, path: str | Path) -> Detector:
        """Read the weights that ``examples/scenes/train_judge.py`` wrote; ready to detect in float32."""
        weights = load_file(path)
        detector = cls(width=weights["head.weight"].shape[1])
        detector.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return detector.eval()


def cell_centers(device: torch.device, side: int = CANVAS // STRIDE) -> torch.Tensor:
    """Pixel coordinates (x, y) of the middle of every cell: float32 [2, side, side]."""
    steps = (torch.arange(side, device=device) + 0.5) * STRIDE
    return torch.stack((steps.expand(side, side), steps[:, None].expand(side, side)))


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return width * height / (sum(areas) - width * height)


def to_pictures(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of 64 x 64 pixels as float32 [B, 3, 64, 64] in [-1, 1]."""
    for image in images:
        if image.size != (CANVAS, CANVAS):
            raise ValueError(f"The judge reads pictures of {CANVAS} x {CANVAS} pixels, got {image.size}.")
    values = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1.0
