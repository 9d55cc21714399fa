# SPDX-License-Identifier: Apache-2.0
"""GenEval's rules (Ghosh et al., arXiv:2310.11513): detections and what the prompt asked for in, right or wrong out.

The rules know nothing of the detector. A detection carries the name, the score, the box and the color that some
detector and some color classifier gave it, so that the same code scores real models and drawn scenes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .judgement import BenchmarkScores, Judgement


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # counting asks for sure detections only
POSITION_MARGIN = 0.1  # of the sum of both boxes' sides, taken off the distance of their centers
_DIRECTION = 0.5  # cosine between the margin-reduced offset and an axis

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """One object that a detector found.

    Args:
        name: Class name.
        score: Confidence in [0, 1].
        box: (left, top, right, bottom) in pixels, y pointing down.
        color: Color name, or ``None`` where none was classified.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


@dataclass(frozen=True)
class Requirement:
    """What a prompt says of one class.

    Args:
        name: Class name.
        count: How many are to be there at least.
        color: The color that ``count`` of them are to have.
        position: A relation and the index of the earlier requirement that it refers to: ``("left of", 0)`` means
            that this class is to be left of the class of the first requirement.
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"A requirement counts from 1, got count={self.count} for {self.name!r}.")
        if self.position and self.position[0] not in RELATIONS:
            raise ValueError(f"Unknown relation {self.position[0]!r}; choose from {', '.join(RELATIONS)}.")


@dataclass(frozen=True)
class Task:
    """A prompt with what is to be seen in its picture.

    Args:
        tag: One of ``TASKS``, or any other word for prompts outside of GenEval's six tasks.
        prompt: The text that the pipeline gets.
        include: What has to be there.
        exclude: What must not be there: a class found ``count`` times or more makes the picture wrong.
    """

    tag: str
    prompt: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        for index, requirement in enumerate(self.include):
            if requirement.position and not 0 <= requirement.position[1] < index:
                raise ValueError(
                    f"Requirement {index} of {self.prompt!r} refers to requirement {requirement.position[1]}; a "
                    "position can only refer to an earlier one."
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Task:
        """Read one line of GenEval's ``evaluation_metadata.jsonl``, as parsed JSON.

        Raises:
            ValueError: If a field is missing or is not what GenEval writes; the message names it.
        """
        try:
            include, exclude = (
                tuple(
                    Requirement(
                        clause["class"],
                        clause["count"],
                        clause.get("color"),
                        (clause["position"][0], clause["position"][1]) if clause.get("position") else None,
                    )
                    for clause in metadata.get(part, ())
                )
                for part in ("include", "exclude")
            )
            return cls(metadata["tag"], metadata["prompt"], include, exclude)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"This is not a line of GenEval's metadata ({error!r}): {metadata!r}") from error

    @property
    def threshold(self) -> float:
        """The score up to which detections are not looked at."""
        return COUNTING_THRESHOLD if self.tag == "counting" else SCORE_THRESHOLD


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt says, and if not, why."""

    correct: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.correct

    @property
    def judgement(self) -> Judgement:
        """1 for a right picture, 0 for a wrong one."""
        return Judgement(float(self.correct), "; ".join(self.reasons) or None)


def relative_position(box: Sequence[float], other: Sequence[float]) -> frozenset[str]:
    """Where ``box`` is, seen from ``other``: none, one or two of the four relations.

    The offset of the centers is shortened on each axis by ``POSITION_MARGIN`` times the sum of both sides. A relation
    holds when what is left points its way: more than half of the length of the unshortened offset.
    """
    sides = [box[k + 2] - box[k] + other[k + 2] - other[k] for k in (0, 1)]
    offset = [(box[k] + box[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    shortened = [max(abs(offset[k]) - POSITION_MARGIN * sides[k], 0.0) for k in (0, 1)]
    if max(shortened) < 1e-3:
        return frozenset()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    names = (("left of", "right of"), ("above", "below"))
    return frozenset(names[k][offset[k] > 0] for k in (0, 1) if shortened[k] / length > _DIRECTION)


def score(task: Task, detections: Iterable[Detection]) -> Verdict:
    """Apply GenEval's rules to one picture.

    Of each class the ``count`` surest detections are looked at. They have to be enough, to have the color, and each of
    them has to stand in the relation to each of those it refers to.
    """
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > task.threshold:
            found.setdefault(detection.name, []).append(detection)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for requirement in task.include:
        chosen = found.get(requirement.name, [])[: requirement.count]
        complaint = _complaint(requirement, chosen, task, matched)
        matched.append(None if complaint else chosen)
        if complaint:
            reasons.append(complaint)
    for requirement in task.exclude:
        count = len(found.get(requirement.name, []))
        if count >= requirement.count:
            reasons.append(f"expected fewer than {requirement.count} {requirement.name}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _complaint(
    requirement: Requirement, chosen: list[Detection], task: Task, matched: list[list[Detection] | None]
) -> str | None:
    """What is wrong with the detections of one requirement; ``None`` if nothing is."""
    name = requirement.name
    if len(chosen) < requirement.count:
        return f"expected {requirement.count} {name}, found {len(chosen)}"
    if requirement.color is not None:
        colors = [detection.color for detection in chosen]
        if colors.count(requirement.color) < requirement.count:
            seen = ", ".join(str(color) for color in colors)
            return f"expected {requirement.count} {requirement.color} {name}, found {seen}"
    if requirement.position is not None:
        relation, target = requirement.position
        anchors, anchor_name = matched[target], task.include[target].name
        if anchors is None:
            return f"no {anchor_name} for {name} to be {relation}"
        for detection in chosen:
            for anchor in anchors:
                relations = relative_position(detection.box, anchor.box)
                if relation not in relations:
                    actual = " and ".join(sorted(relations)) or "too close to"
                    return f"expected {name} {relation} {anchor_name}, found it {actual} it"
    return None


def aggregate(results: Iterable[tuple[Task, Verdict]]) -> BenchmarkScores:
    """Scores of judged pictures, the tasks in GenEval's order; other tags follow.

    Raises:
        ValueError: If there are none.
    """
    order = {tag: index for index, tag in enumerate(TASKS)}
    judged = sorted(results, key=lambda result: (order.get(result[0].tag, len(order)), result[0].tag))
    if not judged:
        raise ValueError("There is nothing to aggregate: no picture was scored.")
    return BenchmarkScores(tuple(task.tag for task, _ in judged), tuple(verdict.judgement for _, verdict in judged))
