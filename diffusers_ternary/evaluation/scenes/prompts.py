# SPDX-License-Identifier: Apache-2.0
"""The prompts of Scenes: GenEval's six tasks over the vocabulary, drawn at random, and read back from text.

A prompt's **combinations** (class and color, pair of classes, class and number) decide by SHA-256 whether it is held
out. No picture with a held-out combination is drawn in training; every word of it is.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator

from ..geneval import RELATIONS, TASKS, Requirement, Task
from .vocabulary import CLASSES, COLORS, MAX_COUNT, NUMBERS, PLURALS


COMPOSED = "composed"  # a seventh kind, for training and for users: up to two groups with numbers, colors, a relation
MAX_OBJECTS = 4
_HELD_OUT_SHARE = 0.15
_HELD_OUT_NUMBERS = 0.3  # of class and number: there are few of them


def held_out_combination(combination: str) -> bool:
    """Whether a combination is never drawn in training."""
    share = _HELD_OUT_NUMBERS if combination[0].isdigit() else _HELD_OUT_SHARE
    return int.from_bytes(hashlib.sha256(combination.encode()).digest()[:4], "big") < share * 2**32


def combinations_of(include: tuple[Requirement, ...]) -> Iterator[str]:
    """What a prompt combines, each as a short text; no more than one of a class is not a combination."""
    for requirement in include:
        if requirement.color is not None:
            yield f"{requirement.color} {requirement.name}"
        if requirement.count > 1:
            yield f"{requirement.count} {requirement.name}"
    for first, second in itertools.combinations(sorted(requirement.name for requirement in include), 2):
        yield f"{first} + {second}"


def is_held_out(task: Task) -> bool:
    """Whether any combination of a prompt is held out."""
    return any(held_out_combination(combination) for combination in combinations_of(task.include))


def phrase(requirement: Requirement, *, numeral: bool = False) -> str:
    """The noun phrase of a requirement: ``a red cat``, ``two keys``; with ``numeral`` also ``one key``."""
    noun = requirement.name if requirement.count == 1 else PLURALS[requirement.name]
    words = noun if requirement.color is None else f"{requirement.color} {noun}"
    if requirement.count > 1 or numeral:
        return f"{NUMBERS[requirement.count]} {words}"
    return f"{'an' if words[0] in 'aeio' or words.startswith('umb') else 'a'} {words}"


def caption(task_tag: str, include: tuple[Requirement, ...], rng: random.Random | None = None) -> str:
    """GenEval's wording of a prompt; with ``rng`` one of several wordings."""
    beginning, link, to_the = "a photo of ", " and ", ""
    if rng is not None:
        beginning = rng.choice((beginning, beginning, "a picture of ", ""))
        link = rng.choice((link, link, " with "))
        to_the = rng.choice(("", "to the "))
    phrases = [phrase(requirement, numeral=task_tag == "counting") for requirement in include]
    if len(include) == 2 and include[1].position:
        relation = include[1].position[0]
        link = f" {to_the if relation.endswith('of') else ''}{relation} "
        phrases.reverse()  # GenEval names the class that is placed first, and the one it refers to second
    return beginning + link.join(phrases)


def make_task(tag: str, include: tuple[Requirement, ...], rng: random.Random | None = None) -> Task:
    """A prompt from what it asks for. Counting also excludes one more."""
    exclude = tuple(Requirement(r.name, r.count + 1) for r in include) if tag == "counting" else ()
    return Task(tag, caption(tag, include, rng), include, exclude)


def draw_include(tag: str, rng: random.Random) -> tuple[Requirement, ...]:
    """What a random prompt of a task asks for, held out or not."""
    first, second = rng.sample(CLASSES, 2)
    colors = rng.choices(tuple(COLORS), k=2)
    if tag == "single_object":
        return (Requirement(first),)
    if tag == "two_object":
        return (Requirement(first), Requirement(second))
    if tag == "counting":
        return (Requirement(first, rng.randint(2, MAX_COUNT)),)
    if tag == "colors":
        return (Requirement(first, color=colors[0]),)
    if tag == "position":
        return (Requirement(first), Requirement(second, position=(rng.choice(RELATIONS), 0)))
    if tag == "color_attr":
        return (Requirement(first, color=colors[0]), Requirement(second, color=colors[1]))
    if tag != COMPOSED:
        raise ValueError(f"Unknown task {tag!r}; choose from {', '.join((*TASKS, COMPOSED))}.")
    counts = rng.choice(((1,), (1, 1), (1, 2), (2, 1), (2,), (3,), (4,), (2, 2), (1, 3), (3, 1)))
    relation = rng.choice((*RELATIONS, None)) if len(counts) == 2 else None
    return tuple(
        Requirement(
            name,
            count,
            color=color if rng.random() < 0.7 else None,
            position=(relation, 0) if relation and index == 1 else None,
        )
        for index, (name, count, color) in enumerate(zip((first, second), counts, colors, strict=False))
    )


def training_task(tag: str, rng: random.Random) -> Task:
    """A random prompt of a task without held-out combinations, in one of several wordings."""
    while True:
        include = draw_include(tag, rng)
        if tag == "counting" and rng.random() < 0.15:
            include = (Requirement(include[0].name),)  # "one key", which GenEval does not ask for
        task = make_task(tag, include, rng)
        if not is_held_out(task):
            return task


def benchmark_tasks(count: int, seed: int, *, held_out: bool = True) -> list[Task]:
    """Prompts in GenEval's wording, the six tasks in turn.

    Args:
        count: Number of prompts; 553 is GenEval's.
        seed: Seed of the prompts.
        held_out: ``True``: every prompt has a held-out combination, except those of a single object, which combine
            nothing. ``False``: no prompt has one.
    """
    rng = random.Random(f"scenes {seed} {held_out}")
    tasks: list[Task] = []
    while len(tasks) < count:
        tag = TASKS[len(tasks) % len(TASKS)]
        task = make_task(tag, draw_include(tag, rng))
        if tag == "single_object" or is_held_out(task) == held_out:
            tasks.append(task)
    return tasks


def tuning_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts to calibrate, to distill and to choose settings with; the benchmark asks for none of them.

    The six tasks and ``COMPOSED`` in turn, in several wordings, without held-out combinations. Single objects combine
    nothing, so they are asked for in other words than the benchmark's. Short prompts repeat.

    Args:
        count: Number of prompts.
        seed: The same seed gives the same prompts, on every machine.
    """
    rng = random.Random(f"scenes tuning {seed}")
    tags = (*TASKS, COMPOSED)
    prompts: list[str] = []
    while len(prompts) < count:
        tag = tags[len(prompts) % len(tags)]
        task = training_task(tag, rng)
        combined = next(combinations_of(task.include), None) is not None
        if combined or task.prompt != caption("single_object", task.include):
            prompts.append(task.prompt)
    return prompts


_NOUNS = {name: name for name in CLASSES} | {plural: name for name, plural in PLURALS.items()}
_PHRASE = re.compile(rf"(?:(an?|{'|'.join(NUMBERS[1:])}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(sorted(_NOUNS))})")
_LINK = re.compile(rf" (?:(?:to the )?({'|'.join(RELATIONS)})|and|with) ")
_BEGINNING = re.compile(r"a (?:photo|picture) of ")


def read_task(prompt: str) -> Task | None:
    """What a prompt asks for; ``None`` where the grammar does not know its words, so that nothing can be scored."""
    text = " ".join(prompt.lower().replace(",", " ").split()).rstrip(".")
    if beginning := _BEGINNING.match(text):
        text = text[beginning.end() :]
    link = _LINK.search(text)
    parts = (text[: link.start()], text[link.end() :]) if link else (text,)
    matches = [_PHRASE.fullmatch(part) for part in parts]
    relation = link[1] if link else None
    include: list[Requirement] = []
    numeral = False
    for match in reversed(matches) if relation else matches:
        if match is None:
            return None
        article, color, noun = match.groups()
        count = NUMBERS.index(article) if article in NUMBERS else 1
        if noun != (PLURALS[_NOUNS[noun]] if count > 1 else _NOUNS[noun]):
            return None
        numeral = numeral or article in NUMBERS
        position = (relation, 0) if relation and include else None
        include.append(Requirement(_NOUNS[noun], count, color, position))
    if (
        len({requirement.name for requirement in include}) < len(include)
        or sum(r.count for r in include) > MAX_OBJECTS
    ):
        return None
    tag = _tag_of(include, numeral)
    exclude = tuple(Requirement(r.name, r.count + 1) for r in include) if numeral else ()
    return Task(tag, prompt, tuple(include), exclude)


def _tag_of(include: list[Requirement], numeral: bool) -> str:
    """Which of GenEval's tasks asks for this; ``COMPOSED`` if none does."""
    colored = sum(requirement.color is not None for requirement in include)
    placed = any(requirement.position for requirement in include)
    if numeral:
        return "counting" if len(include) == 1 and not colored else COMPOSED
    if placed:
        return COMPOSED if colored else "position"
    if colored:
        return ("colors", "color_attr")[len(include) - 1] if colored == len(include) else COMPOSED
    return ("single_object", "two_object")[len(include) - 1]
