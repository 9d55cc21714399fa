# SPDX-License-Identifier: Apache-2.0
"""The judge: does a picture show the attributes that its prompt asks for?

A small convolutional classifier with one head per attribute of the pixel-people grammar. It scores generated pictures
as GenEval (arXiv:2310.11513) scores objects and colors: an attribute that the prompt mentions is right or wrong, one
that it does not mention is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffusers_ternary.demo.grammar import ATTRIBUTES, attributes_of


IMAGE_SIZE = 16
_BATCH = 512
_DATA = Path(__file__).with_name("data")

Images = Sequence[Image.Image] | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class AttributeAccuracy:
    """How well pictures show what their prompts ask for; all values are fractions between 0 and 1.

    Attributes:
        per_attribute: Attribute name -> share of the pictures whose prompt mentions it that show it. Attributes that
            no prompt mentions are missing.
        mean: Unweighted mean of ``per_attribute``.
        all_attributes: Share of the pictures that show every attribute of their prompt.
        count: Number of pictures.
    """

    per_attribute: Mapping[str, float]
    mean: float
    all_attributes: float
    count: int


class Judge(nn.Module):
    """Classifies every attribute of 16x16 portraits; load the trained one with :meth:`from_package`."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 32, 64, 64, 128)
        strides = (1, 2, 1, 2)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})

    @classmethod
    def from_package(cls) -> Judge:
        """The trained judge that ships with the package, in float32 and evaluation mode."""
        judge = cls()
        stored = load_file(_DATA / "judge.safetensors")
        judge.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
        return judge.eval().requires_grad_(False)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last hidden layer [B, 128] of pixels [B, 3, 16, 16] in [-1, 1]."""
        return self.trunk(pixels)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Class logits per attribute.

        Args:
            pixels: [B, 3, 16, 16], in [-1, 1].

        Returns:
            Attribute name -> logits [B, number of values].
        """
        hidden = self.features(pixels)
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: Images) -> list[dict[str, str]]:
        """The most likely value of every attribute, visible or not, of each image (see :func:`to_pixels`)."""
        pixels = to_pixels(images)
        classes = {name: torch.empty(len(pixels), dtype=torch.long) for name in ATTRIBUTES}
        for start in range(0, len(pixels), _BATCH):
            chunk = slice(start, start + _BATCH)
            for name, logits in self(pixels[chunk].to(next(self.parameters()).device)).items():
                classes[name][chunk] = logits.argmax(dim=1).cpu()
        return [
            {name: values[int(classes[name][i])] for name, values in ATTRIBUTES.items()} for i in range(len(pixels))
        ]

    def attribute_accuracy(self, images: Images, prompts: Sequence[str]) -> AttributeAccuracy:
        """Score images against the prompts that they were generated from.

        Args:
            images: One image per prompt, in any form that :func:`to_pixels` takes.
            prompts: Prompts of the pixel-people grammar, each mentioning at least one attribute.

        Raises:
            ValueError: If the numbers differ, or a prompt is empty or not in the grammar.
        """
        if len(images) != len(prompts) or not prompts:
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one image per prompt.")
        right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
        all_right: list[bool] = []
        for seen, prompt in zip(self.classify(images), prompts, strict=True):
            asked = attributes_of(prompt)
            if not asked:
                raise ValueError(f"The prompt {prompt!r} mentions no attribute: there is nothing to judge.")
            hits = {name: seen[name] == value for name, value in asked.items()}
            all_right.append(all(hits.values()))
            for name, hit in hits.items():
                right[name].append(hit)
        per_attribute = {name: sum(hits) / len(hits) for name, hits in right.items() if hits}
        return AttributeAccuracy(
            per_attribute=per_attribute,
            mean=sum(per_attribute.values()) / len(per_attribute),
            all_attributes=sum(all_right) / len(all_right),
            count=len(all_right),
        )


def attribute_accuracy(images: Images, prompts: Sequence[str]) -> AttributeAccuracy:
    """Score images with the judge that ships with the package; see :meth:`Judge.attribute_accuracy`."""
    return Judge.from_package().attribute_accuracy(images, prompts)


@dataclass(frozen=True)
class RealImages:
    """Rendered portraits from held-out combinations, with the prompts that describe them completely."""

    images: np.ndarray
    prompts: tuple[str, ...]


def real_images() -> RealImages:
    """The held-out real portraits that ship with the package: ``images`` is uint8 [N, 16, 16, 3]."""
    with np.load(_DATA / "held_out_images.npz") as stored:
        return RealImages(images=stored["images"], prompts=tuple(str(prompt) for prompt in stored["prompts"]))


def to_pixels(images: Images) -> torch.Tensor:
    """Images as float32 [B, 3, 16, 16] in [-1, 1].

    Args:
        images: PIL images; or a uint8 array [B, 16, 16, 3]; or a float array [B, 16, 16, 3] in [0, 1] (a pipeline's
            ``output_type="np"``); or a float tensor [B, 3, 16, 16] in [0, 1] (``output_type="pt"``).

    Raises:
        ValueError: If the images are not 16x16 RGB: enlarged pictures are not what the judge was trained on.
    """
    if isinstance(images, torch.Tensor):
        pixels = images.detach().float() * 2.0 - 1.0
    else:
        if not isinstance(images, np.ndarray):
            images = np.stack([np.asarray(image.convert("RGB")) for image in images])
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        pixels = torch.from_numpy(images.astype(np.float32)).movedim(-1, 1) * (2.0 / scale) - 1.0
    if pixels.ndim != 4 or pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images of shape {tuple(pixels.shape[1:])} (channels first): the judge reads RGB images of "
            f"{IMAGE_SIZE}x{IMAGE_SIZE} pixels; generate with DEMO_CALL and do not resize."
        )
    return pixels.contiguous()
