# SPDX-License-Identifier: Apache-2.0
"""T2I-CompBench (Huang et al., arXiv:2307.06350): attribute binding and 2D relations, prompts and rules."""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .geneval import Detection
from .geneval_prompts import CLASSES, COLORS


# The adjectives that the paper lists (section 3), and things that have such shapes or are made of such stuff.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": (
        *("long", "tall", "short", "big", "small", "cubic", "cylindrical", "pyramidal", "round", "circular", "oval"),
        *("oblong", "spherical", "triangular", "square", "rectangular", "conical", "pentagonal", "teardrop"),
        *("crescent", "diamond"),
    ),
    "texture": ("rubber", "plastic", "metallic", "wooden", "fabric", "fluffy", "leather", "glass"),
}
NOUNS: Mapping[str, tuple[str, ...]] = {
    "color": CLASSES[1:],
    "shape": (
        *("table", "clock", "mirror", "cookie", "lamp", "rug", "plate", "box", "pillow", "kite", "sign", "vase"),
        *("candle", "earring", "window", "bowl", "cushion", "button", "tile", "cake"),
    ),
    "texture": (
        *("chair", "ball", "bag", "toy", "spoon", "table", "shoe", "bottle", "box", "glove", "bowl", "ring"),
        *("lamp", "jacket", "desk", "key", "carpet", "jar", "door", "pillow"),
    ),
}
RELATIONS = ("on the left of", "on the right of", "on the top of", "on the bottom of", "next to", "near", "on side of")
TASKS = (*ATTRIBUTES, "spatial")
_PER_TASK = 100
_SEED = 43
_MAX_OVERLAP = 0.1  # intersection over union
_FUNCTION_WORDS = frozenset(
    (
        *("of", "with", "on", "in", "at", "by", "to", "is", "are", "that", "for", "from", "while", "under", "over"),
        *("near", "against", "into", "has"),
    )
)
_NEAR = 150 / 512  # of the picture's longer side: 150 pixels where the paper draws 512


@dataclass(frozen=True)
class BindingTask:
    """A prompt of two things with an attribute each.

    Args:
        tag (`str`): `"color"`, `"shape"` or `"texture"`.
        prompt (`str`): the text that the pipeline gets.
        phrases (`tuple[str, ...]`): the noun phrases that are asked for one by one.
    """

    tag: str
    prompt: str
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class SpatialTask:
    """A prompt of two things and how they stand to each other.

    Args:
        prompt (`str`): the text that the pipeline gets.
        first, second (`str`): class names.
        relation (`str`): one of `RELATIONS`: where `first` is, seen from `second`.
    """

    prompt: str
    first: str
    second: str
    relation: str
    tag: str = "spatial"


def t2i_compbench_tasks() -> tuple[BindingTask | SpatialTask, ...]:
    """100 prompts of each task by the paper's templates, the same ones in every call.

    They are not the paper's own lists, a part of which was written by a language model; those files can be given to
    [`parse_tasks`].
    """
    rng = random.Random(_SEED)
    tasks: list[BindingTask | SpatialTask] = []
    for tag, adjectives in ATTRIBUTES.items():
        pairs = list(itertools.permutations(range(len(NOUNS[tag])), 2))
        for first, second in rng.sample(pairs, _PER_TASK):
            words = rng.sample(adjectives, 2)
            phrases = tuple(
                _article(f"{word} {NOUNS[tag][noun]}") for word, noun in zip(words, (first, second), strict=True)
            )
            tasks.append(BindingTask(tag, " and ".join(phrases), phrases))
    for pair in rng.sample(list(itertools.permutations(CLASSES, 2)), _PER_TASK):
        relation = rng.choice(RELATIONS)
        prompt = f"{_article(pair[0])} {relation} {_article(pair[1])}"
        tasks.append(SpatialTask(prompt, *pair, relation))
    return tuple(tasks)


def parse_tasks(prompts: Sequence[str], tag: str) -> tuple[list[BindingTask | SpatialTask], list[str]]:
    """Reads prompts of the benchmark's templates, e.g. the lines of its `color_val.txt`.

    Args:
        prompts (`Sequence[str]`): "a red book and a yellow vase", "a cat on the left of a dog".
        tag (`str`): one of `TASKS`.

    Returns:
        The tasks, and the prompts that are of no template: their phrases are not known without a parser of English.

    Raises:
        ValueError: for an unknown tag.
    """
    if tag not in TASKS:
        raise ValueError(f"tag={tag!r} is not one of {', '.join(TASKS)}.")
    tasks: list[BindingTask | SpatialTask] = []
    others: list[str] = []
    for prompt in prompts:
        text = prompt.strip().rstrip(".").lower()
        task = _spatial(prompt, text) if tag == "spatial" else _binding(prompt, text, tag)
        if task is None:
            others.append(prompt)
        else:
            tasks.append(task)
    return tasks, others


def spatial_score(
    task: SpatialTask, detections: Sequence[Detection], image_size: tuple[int, int]
) -> tuple[float, str | None]:
    """The paper's UniDet score: half of it for finding both things, half for their relation; below 0.5 it is 0.

    Args:
        task ([`SpatialTask`]): what was to be drawn.
        detections (`Sequence[Detection]`): what was found; the surest of each class counts.
        image_size (`tuple[int, int]`): width and height in pixels.

    Returns:
        `tuple[float, str | None]`: the score in [0, 1], and what is wrong.
    """
    best: dict[str, Detection] = {}
    for detection in sorted(detections, key=lambda detection: detection.score):
        best[detection.name] = detection
    missing = [name for name in (task.first, task.second) if name not in best]
    if missing:
        return 0.0, f"no {' and no '.join(missing)} found"
    first, second = best[task.first], best[task.second]
    relation = _relation_score(task.relation, first.box, second.box, _NEAR * max(image_size))
    total = 0.25 * (first.score + second.score) + 0.5 * relation
    reason = None if relation == 1 else f"expected {task.first} {task.relation} {task.second}"
    return (total if total >= 0.5 else 0.0), reason


_Box = tuple[float, float, float, float]


def _relation_score(relation: str, box: _Box, other: _Box, near: float) -> float:
    dx, dy = ((box[k] + box[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1))
    if relation in ("next to", "near", "on side of"):
        return 1.0 if min(abs(dx), abs(dy)) < near else near / max(abs(dx), abs(dy))
    axis, sign = {"left": (dx, -1), "right": (dx, 1), "top": (dy, -1), "bottom": (dy, 1)}[relation.split()[2]]
    if axis * sign <= 0 or abs(axis) <= min(abs(dx), abs(dy)):
        return 0.0
    overlap = _intersection_over_union(box, other)
    return 1.0 if overlap < _MAX_OVERLAP else _MAX_OVERLAP / overlap


def _intersection_over_union(box: _Box, other: _Box) -> float:
    sides = [max(0.0, min(box[k + 2], other[k + 2]) - max(box[k], other[k])) for k in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    intersection = sides[0] * sides[1]
    return intersection / (sum(areas) - intersection)


def _binding(prompt: str, text: str, tag: str) -> BindingTask | None:
    phrases = tuple(text.split(" and "))
    if len(phrases) != 2 or not all(_is_noun_phrase(phrase) for phrase in phrases):
        return None
    return BindingTask(tag, prompt, phrases)


def _is_noun_phrase(text: str) -> bool:
    words = re.fullmatch(r"(?:(?:an?|the) )?([a-z][a-z -]*)", text)
    # With one of these words it is more than one noun phrase, or a clause.
    return words is not None and len(words[1].split()) <= 4 and not _FUNCTION_WORDS & set(words[1].split())


def _spatial(prompt: str, text: str) -> SpatialTask | None:
    relations = "|".join(RELATIONS)
    match = re.fullmatch(
        rf"(?:an?|the) (.+?) ({relations}) (?:an?|the) (.+)", text.replace("on top of", "on the top of")
    )
    if match is None:
        return None
    people = ("girl", "boy", "man", "woman")
    first, second = ("person" if name in people else name for name in (match[1], match[3]))
    return SpatialTask(prompt, first, second, match[2])


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
