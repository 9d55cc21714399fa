# SPDX-License-Identifier: Apache-2.0
"""GenEval's 553 prompts, drawn by its published rules: class names, templates, and the order of the draws."""

from collections.abc import Callable, Iterator

import numpy as np

from .geneval import Requirement, Task


# The classes of COCO, with GenEval's clearer names for a few ("computer mouse"), in COCO's order.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_NUMBERS = ("zero", "one", "two", "three", "four")
_SEED = 43  # with 100 draws a task: the published list
_PER_TASK = 100
_COLORABLE = len(CLASSES) - 1  # all but the person, who comes first


def geneval_tasks() -> tuple[Task, ...]:
    """The 553 prompts of GenEval with what their pictures have to show.

    Every class once, then 100 random draws of each other task, of which repeated ones are dropped (Ghosh et al.,
    arXiv:2310.11513, section 3.2). The draws are numpy's `default_rng(43)` in the published order, so the prompts are
    the published ones.

    Returns:
        `tuple[Task, ...]`: 80 of one object, 99 of two, 80 of counting, 94 of colors, 100 of position and 100 of
        color attribution.
    """
    rng = np.random.default_rng(_SEED)
    tasks = [_single_object(index) for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    for draw in (_two_object, _counting, _colors, _position, _color_attr):
        tasks += _repeat(draw, rng)
    return tuple(dict.fromkeys(tasks))


def _repeat(draw: Callable[[np.random.Generator], Task], rng: np.random.Generator) -> Iterator[Task]:
    return (draw(rng) for _ in range(_PER_TASK))


def _single_object(index: int) -> Task:
    name = CLASSES[index]
    return Task("single_object", f"a photo of {_article(name)}", (Requirement(name),))


def _two_object(rng: np.random.Generator) -> Task:
    first, second = _two(rng, CLASSES)
    prompt = f"a photo of {_article(first)} and {_article(second)}"
    return Task("two_object", prompt, (Requirement(first), Requirement(second)))


def _counting(rng: np.random.Generator) -> Task:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, len(_NUMBERS)))
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    prompt = f"a photo of {_NUMBERS[count]} {plural}"
    return Task("counting", prompt, (Requirement(name, count),), exclude=(Requirement(name, count + 1),))


def _colors(rng: np.random.Generator) -> Task:
    name = CLASSES[1 + rng.choice(_COLORABLE)]
    color = COLORS[rng.choice(len(COLORS))]
    return Task("colors", f"a photo of {_article(color)} {name}", (Requirement(name, color=color),))


def _position(rng: np.random.Generator) -> Task:
    placed, anchor = _two(rng, CLASSES)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    prompt = f"a photo of {_article(placed)} {relation} {_article(anchor)}"
    return Task("position", prompt, (Requirement(anchor), Requirement(placed, position=(relation, 0))))


def _color_attr(rng: np.random.Generator) -> Task:
    names = _two(rng, CLASSES[1:])
    colors = _two(rng, COLORS)
    phrases = [f"{_article(color)} {name}" for color, name in zip(colors, names, strict=True)]
    include = tuple(Requirement(name, color=color) for color, name in zip(colors, names, strict=True))
    return Task("color_attr", f"a photo of {' and '.join(phrases)}", include)


def _two(rng: np.random.Generator, words: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.choice(len(words), size=2, replace=False)
    return words[first], words[second]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
