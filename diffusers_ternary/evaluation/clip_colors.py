# SPDX-License-Identifier: Apache-2.0
"""The color of a detected object, by zero-shot classification with CLIP, as GenEval does it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .checkpoints import load_model, load_part
from .detectors import Found


_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_BLANK = (153, 153, 153)  # what surrounds an object in its crop


class ClipColors:
    """Names the color of objects: the CLIP class, averaged over three templates, that is nearest to the crop.

    The crop is the object's box; where the detector gave a mask, the rest of the box is gray (Ghosh et al.,
    arXiv:2310.11513, appendix).

    Args:
        checkpoint (`str` or `os.PathLike`): local folder or Hub id of a CLIP model; GenEval uses
            `openai/clip-vit-large-patch14`.
        colors (`Sequence[str]`): the names to choose from.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where it runs.

    Raises:
        ValueError: if the checkpoint cannot be loaded.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], colors: Sequence[str], *, device: str | torch.device = "cpu"
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.colors = tuple(colors)
        self.model: Any = load_model(CLIPModel, checkpoint, "color classifier").to(device)
        self.tokenizer = load_part(AutoTokenizer, checkpoint, "color classifier")
        self.processor = load_part(AutoImageProcessor, checkpoint, "color classifier")
        self._classes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: Sequence[Found]) -> list[str]:
        """The color of each object."""
        if not found:
            return []
        crops = [_crop(image, item) for item in found]
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.model.device)
        vision = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        embeddings = torch.nn.functional.normalize(vision.float(), dim=-1)  # [objects, D]
        return [
            self.colors[int((self._color_classes(item.detection.name) @ embedding).argmax())]
            for item, embedding in zip(found, embeddings, strict=True)
        ]

    def _color_classes(self, name: str) -> torch.Tensor:
        """One unit vector per color: the mean over the templates of unit vectors, `[colors, D]`."""
        if name not in self._classes:
            texts = [template.format(color=color, name=name) for color in self.colors for template in _TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            text = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
            each = torch.nn.functional.normalize(text.float(), dim=-1).view(len(self.colors), len(_TEMPLATES), -1)
            self._classes[name] = torch.nn.functional.normalize(each.mean(dim=1), dim=-1)
        return self._classes[name]


def _crop(image: Image.Image, item: Found) -> Image.Image:
    left, top, right, bottom = item.detection.box
    if item.mask is not None:
        mask = Image.fromarray(item.mask.numpy())
        image = Image.composite(image, Image.new("RGB", image.size, _BLANK), mask)
    edges = (max(int(left), 0), max(int(top), 0), min(round(right), image.width), min(round(bottom), image.height))
    return image.crop((edges[0], edges[1], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)))
