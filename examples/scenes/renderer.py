# SPDX-License-Identifier: Apache-2.0
"""Draw scenes in torch, whole batches on any device: colored silhouettes on a jittered 3 x 3 grid.

A scene is laid out on the host (a handful of integers), and composited where the model trains. Labels are the
layout: nothing is drawn that it does not say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffusers_ternary.evaluation.geneval import Task, relative_position
from diffusers_ternary.evaluation.scenes.prompts import MAX_OBJECTS, held_out_combination
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES, COLORS


SPRITES = Path(__file__).with_name("sprites.npz")
CANVAS = 64  # pixels
CLOSE_UP = 32  # pixels, of a canvas that one object fills
GRID = 3
CELL = CANVAS // GRID
JITTER = 2  # pixels either way
NOTHING = -1

BACKGROUNDS = ((152, 152, 152), (112, 130, 152), (192, 176, 140), (150, 172, 146), (168, 146, 168), (120, 166, 166))
_SHADING = 0.08  # a background is lighter by this at its top, and darker at its bottom

_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Layout:
    """A batch of scenes as integers.

    Args:
        objects: int64 [batch, ``MAX_OBJECTS``, 5]: class, color, size index, left, top; class ``NOTHING`` for none.
        background: int64 [batch].
        canvas: Pixels on a side.
    """

    objects: torch.Tensor
    background: torch.Tensor
    canvas: int = CANVAS

    def to(self, device: torch.device | str) -> Layout:
        """The same on another device."""
        return Layout(self.objects.to(device), self.background.to(device), self.canvas)


class Sprites:
    """The masks and how large they are."""

    def __init__(self, path: Path = SPRITES) -> None:
        stored = np.load(path)
        if tuple(stored["classes"]) != CLASSES:
            raise ValueError(f"{path} was made for other classes; run make_sprites.py again.")
        self.masks = torch.from_numpy(stored["masks"])  # uint8 [classes, sizes, side, side]
        self.extents = stored["extents"].astype(int)  # [classes, sizes, 2]: width, height
        self.num_sizes = len(stored["sizes"])


def corner(place: int, extent: int, rng: random.Random) -> int:
    """Where an object of ``extent`` pixels begins in row or column ``place`` of the grid, about the middle of it."""
    slack = max(0, min(JITTER, (CELL - int(extent) - 1) // 2))  # a pixel is left between neighbors
    return int((place + 0.5) * CANVAS / GRID - extent / 2 + rng.randint(-slack, slack))


def lay_out(task: Task, sprites: Sprites, rng: random.Random, *, training: bool) -> tuple[list[list[int]], int]:
    """Place what a prompt asks for: rows of ``Layout.objects`` and the background.

    What the prompt leaves open is drawn at random. In training no color is chosen that makes a held-out combination.
    """
    background = rng.randrange(len(BACKGROUNDS))
    wanted: list[tuple[int, int, int]] = []  # class, color, requirement
    for index, requirement in enumerate(task.include):
        color = requirement.color
        while color is None or (training and held_out_combination(f"{color} {requirement.name}")):
            color = rng.choice(_COLOR_NAMES)
        kind = CLASSES.index(requirement.name)
        wanted += [(kind, _COLOR_NAMES.index(color), index)] * requirement.count
    while True:
        cells = rng.sample(range(GRID * GRID), len(wanted))
        objects: list[list[int]] = []
        boxes: list[list[tuple[int, int, int, int]]] = [[] for _ in task.include]
        for (kind, color, index), cell in zip(wanted, cells, strict=True):
            size = rng.randrange(sprites.num_sizes)
            width, height = sprites.extents[kind, size]
            left, top = corner(cell % GRID, width, rng), corner(cell // GRID, height, rng)
            objects.append([kind, color, size, left, top])
            boxes[index].append((left, top, left + int(width), top + int(height)))
        if _relations_hold(task, boxes):
            return objects, background


def _relations_hold(task: Task, boxes: list[list[tuple[int, int, int, int]]]) -> bool:
    """Whether GenEval's rule sees the relations that the prompt asks for."""
    return all(
        requirement.position[0] in relative_position(box, other)
        for index, requirement in enumerate(task.include)
        if requirement.position
        for box in boxes[index]
        for other in boxes[requirement.position[1]]
    )


def layout_of(tasks: Sequence[Task], sprites: Sprites, rng: random.Random, *, training: bool) -> Layout:
    """Lay out one scene per prompt; an empty ``include`` gives an empty scene."""
    objects = torch.full((len(tasks), MAX_OBJECTS, 5), NOTHING)
    background = torch.zeros(len(tasks), dtype=torch.int64)
    for index, task in enumerate(tasks):
        rows, background[index] = lay_out(task, sprites, rng, training=training)
        objects[index, : len(rows)] = torch.tensor(rows).reshape(-1, 5)
    return Layout(objects, background)


def close_up_of(tasks: Sequence[Task], sprites: Sprites, rng: random.Random) -> Layout:
    """Lay out the one object of each prompt on a canvas of ``CLOSE_UP`` pixels, for training."""
    layout = layout_of(tasks, sprites, rng, training=True)
    for kind, _, size, *place in layout.objects[:, 0]:
        for axis, extent in enumerate(sprites.extents[int(kind), int(size)]):
            slack = (CLOSE_UP - int(extent)) // 2
            place[axis].fill_(slack + rng.randint(-min(slack, 2 * JITTER), min(slack, 2 * JITTER)))
    return Layout(layout.objects, layout.background, CLOSE_UP)


class Renderer:
    """Composites layouts: float32 pictures [batch, 3, canvas, canvas] in [-1, 1].

    Args:
        sprites: The masks.
        device: Where to draw.
    """

    def __init__(self, sprites: Sprites, device: torch.device | str = "cpu") -> None:
        # A frame of transparent pixels around the masks is what indices outside of them are clamped to.
        self.masks = nn.functional.pad(sprites.masks, (1, 1, 1, 1)).to(device).float() / 255.0
        self.colors = torch.tensor(list(COLORS.values()), device=device) / 127.5 - 1.0
        shades = torch.linspace(1.0 + _SHADING, 1.0 - _SHADING, CANVAS, device=device)
        plain = torch.tensor(BACKGROUNDS, device=device)
        self.backgrounds = (plain[:, :, None] * shades) / 127.5 - 1.0  # [backgrounds, 3, rows]
        self.device = device

    def coverage(self, layout: Layout) -> torch.Tensor:
        """How much of each pixel each object covers: float32 [batch, ``MAX_OBJECTS``, canvas, canvas] in [0, 1]."""
        kind, _, size, left, top = layout.objects.unbind(-1)  # each [batch, objects]
        last = self.masks.shape[-1] - 1
        pixels = torch.arange(layout.canvas, device=self.device)
        row = (pixels - top[..., None] + 1).clamp(0, last)  # [batch, objects, canvas]
        column = (pixels - left[..., None] + 1).clamp(0, last)
        masks = self.masks[
            kind.clamp(min=0)[..., None, None],
            size.clamp(min=0)[..., None, None],
            row[..., None],
            column[..., None, :],
        ]
        return masks * (kind != NOTHING)[..., None, None]

    def shares(self, layout: Layout, side: int) -> torch.Tensor:
        """What each object covers of each of ``side`` x ``side`` patches: float32 [batch, side * side, objects]."""
        return nn.functional.adaptive_avg_pool2d(self.coverage(layout), side).flatten(2).mT

    def owners(self, layout: Layout, side: int) -> torch.Tensor:
        """The object that covers most of a patch, int64 [batch, side * side]; ``NOTHING`` if it is less than half."""
        share, owner = self.shares(layout, side).max(-1)
        return owner.masked_fill(share < 0.5, NOTHING)

    def content(self, layout: Layout, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each of ``side`` x ``side`` patches each class and each color covers.

        Returns:
            float32 [batch, side * side, classes + 1] and [batch, side * side, colors + 1]; the background's part is
            the last, and the parts of a patch sum to 1.
        """
        cover = self.shares(layout, side)
        shares = []
        for field, number in ((0, len(CLASSES)), (1, len(COLORS))):
            kinds = layout.objects[..., field].clamp(min=0)[:, None].expand(cover.shape)
            share = cover.new_zeros(*cover.shape[:2], number).scatter_add_(-1, kinds, cover)
            shares.append(torch.cat((share, 1.0 - share.sum(-1, keepdim=True)), -1))
        return shares[0], shares[1]

    def draw(self, layout: Layout) -> torch.Tensor:
        """The pictures of a layout."""
        cover = self.coverage(layout)
        first = (CANVAS - layout.canvas) // 2  # a close-up shows the middle of the background
        pictures = self.backgrounds[layout.background, :, first : first + layout.canvas, None]
        pictures = pictures.expand(-1, -1, -1, layout.canvas)
        colors = self.colors[layout.objects[..., 1].clamp(min=0)]  # [batch, objects, 3]
        for slot in range(layout.objects.shape[1]):
            pictures = torch.lerp(pictures, colors[:, slot, :, None, None], cover[:, slot, None])
        return pictures


def boxes_of(layout: Layout, sprites: Sprites) -> torch.Tensor:
    """The boxes of the objects in pixels, [batch, ``MAX_OBJECTS``, 4]: left, top, right, bottom; zeros for none."""
    kind, _, size, left, top = layout.objects.unbind(-1)
    extents = torch.from_numpy(sprites.extents).to(kind.device)[kind.clamp(min=0), size.clamp(min=0)]
    corner = torch.stack((left, top), -1)
    return torch.cat((corner, corner + extents), -1) * (kind != NOTHING)[..., None]
