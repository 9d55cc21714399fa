# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is, and what its pictures are worth: one judgement each, a mean per task, the mean of the tasks."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a picture is worth.

    Args:
        score (`float`): in [0, 1]; 1 is right.
        reason (`str`, *optional*): what is wrong.
    """

    score: float
    reason: str | None = None


class Benchmark(Protocol):
    """Prompts with a task each, and a judge of the pictures.

    Args:
        name (`str`): as it is called in reports.
        prompts (`tuple[str, ...]`): what to draw.
        tags (`tuple[str, ...]`): the task of each prompt.
        images_per_prompt (`int`): pictures of each prompt, from seeds of their own.

    A judge that reads pictures of one size only says so in `image_size` (width and height in pixels), so that a
    pipeline which draws others is refused before it draws.
    """

    name: str
    prompts: tuple[str, ...]
    tags: tuple[str, ...]
    images_per_prompt: int

    def judge(self, index: int, image: Image.Image) -> Judgement:
        """Judges a picture of `prompts[index]`."""


@dataclasses.dataclass(frozen=True)
class BenchmarkScores:
    """What the pictures of one model are worth.

    Args:
        tags (`tuple[str, ...]`): the task of each picture.
        judgements (`tuple[Judgement, ...]`): of each picture.
    """

    tags: tuple[str, ...]
    judgements: tuple[Judgement, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of pictures of each task."""
        return {tag: self.tags.count(tag) for tag in dict.fromkeys(self.tags)}

    @property
    def per_task(self) -> dict[str, float]:
        """Mean score of each task's pictures."""
        totals = dict.fromkeys(self.tags, 0.0)
        for tag, judgement in zip(self.tags, self.judgements, strict=True):
            totals[tag] += judgement.score
        return {tag: total / self.counts[tag] for tag, total in totals.items()}

    @property
    def overall(self) -> float:
        """Mean of the tasks, as GenEval reports it: each weighs the same, whatever its number of pictures."""
        per_task = self.per_task
        return sum(per_task.values()) / len(per_task)


def check_image_size(benchmark: Benchmark, size: tuple[int, int] | None, *, pipeline: str) -> None:
    """Checks that the judge can read pictures of this width and height; `None` is not known yet.

    Raises:
        ValueError: names both sizes and the remedy.
    """
    needed: tuple[int, int] | None = getattr(benchmark, "image_size", None)
    if needed is None or size is None or size == needed:
        return
    width, height = needed
    raise ValueError(
        f"The judge of {benchmark.name} reads pictures of {width} x {height} pixels, but {pipeline} draws "
        f"{size[0]} x {size[1]}. Evaluate a model that draws that size, and ask for it with "
        f'call_kwargs={{"height": {height}, "width": {width}}} (--height {height} --width {width}).'
    )


def judge_all(
    benchmark: Benchmark,
    images: Sequence[Image.Image],
    *,
    wrap: Callable[[Sequence[Image.Image]], Iterable[Image.Image]] = iter,
) -> BenchmarkScores:
    """Judges `images_per_prompt` pictures of each prompt, in order.

    Args:
        benchmark ([`Benchmark`]): the judge.
        images (`Sequence[PIL.Image.Image]`): all pictures of the first prompt, then those of the second, ...
        wrap (`Callable`, *optional*): put around the pictures, to show progress.

    Raises:
        ValueError: if there is another number of pictures.
    """
    each = benchmark.images_per_prompt
    if len(images) != each * len(benchmark.prompts):
        raise ValueError(
            f"{len(images)} pictures for {len(benchmark.prompts)} prompts of {benchmark.name}; it takes {each} each."
        )
    judgements = tuple(benchmark.judge(index // each, image) for index, image in enumerate(wrap(images)))
    tags = tuple(tag for tag in benchmark.tags for _ in range(each))
    return BenchmarkScores(tags, judgements)
