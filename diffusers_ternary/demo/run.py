# SPDX-License-Identifier: Apache-2.0
"""The demo: the embedded model and its ternary versions draw the same held-out prompts, and the judge counts."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..evaluation import EvaluationResult, compare, contact_sheet, observe_teacher
from ..files import new_file, write_json
from ..rollouts import Rollouts
from .grammar import held_out_prompts
from .judge import Judge
from .pipeline import DEMO_CALL
from .variants import STUDENTS, TEACHER, Variant, stored_size


QUICK_PROMPTS = 48
FULL_PROMPTS = 256
VELOCITY_PROMPTS = 16
BATCH_SIZE = 16
PROMPT_SEED = 0
DTYPE = torch.float32  # of the activations: the fastest on CPUs without bfloat16 instructions


@dataclasses.dataclass(frozen=True)
class DemoRow:
    """One variant's numbers.

    Args:
        variant (`str`): its name.
        bits_per_weight (`float`): of the converted weights, scales and everything else stored for them included.
        bytes (`int`): of the denoiser's weights in a file.
        attribute_accuracy (`float`): share of the attributes asked for that the judge sees, mean over attributes.
        all_attributes (`float`): share of the images in which the judge sees all of them.
        psnr_db (`float`, *optional*): of the images to the teacher's; `None` for the teacher.
        velocity_nmse (`float`, *optional*): of the denoiser on the teacher's trajectories; `None` for the teacher.
        seconds (`float`): wall time of drawing all images.
    """

    variant: str
    bits_per_weight: float
    bytes: int
    attribute_accuracy: float
    all_attributes: float
    psnr_db: float | None
    velocity_nmse: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: numbers that are not finite become `None`."""
        values = dataclasses.asdict(self).items()
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values}


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
        rows (`tuple[DemoRow, ...]`): the teacher first.
        prompts (`tuple[str, ...]`): held out from the training of the teacher and the judge.
        images (`dict[str, tuple[PIL.Image.Image, ...]]`): variant → one image per prompt.
        comparisons (`dict[str, EvaluationResult]`): variant → its comparison with the teacher.
    """

    rows: tuple[DemoRow, ...]
    prompts: tuple[str, ...]
    images: dict[str, tuple[Image.Image, ...]]
    comparisons: dict[str, EvaluationResult]

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes a list with one object per variant."""
        write_json(path, [row.to_dict() for row in self.rows], allow_nan=False)

    def save_contact_sheet(self, path: str | os.PathLike[str], *, max_prompts: int = 8) -> None:
        """Writes the first prompts' images, one row per variant, as PNG."""
        sheet = contact_sheet(self.images, self.prompts, max_prompts=max_prompts)
        with new_file(path) as temporary:
            sheet.save(temporary, format="PNG")


def run_demo(
    *,
    full: bool = False,
    students: Sequence[Variant] = STUDENTS,
    teacher: Variant = TEACHER,
    progress: bool = True,
) -> DemoResult:
    """Draws held-out prompts with the embedded teacher and every student, with the same seeds, and judges them.

    Args:
        full (`bool`, *optional*, defaults to `False`): 256 prompts instead of 48.
        students (`Sequence[Variant]`, *optional*): what to compare with the teacher.
        teacher (`Variant`, *optional*): what to compare with.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar on stderr.
    """
    count = FULL_PROMPTS if full else QUICK_PROMPTS
    prompts = tuple(held_out_prompts(count, PROMPT_SEED))
    rollouts = Rollouts(prompts, tuple(range(count)), DEMO_CALL, BATCH_SIZE)
    pipeline = teacher.load(DTYPE)
    run = observe_teacher(
        pipeline,
        rollouts,
        scorers={"judge": judge_scorer()},
        velocity_prompts=VELOCITY_PROMPTS,
        progress=progress,
    )
    rows = [_row(teacher.name, pipeline, run.scores, run.seconds)]
    images = {teacher.name: run.images}
    comparisons = {}
    for variant in students:
        student = variant.load(DTYPE)
        result = compare(student, run, progress=progress)
        scores = {name: pair.student for name, pair in result.scores.items()}
        rows.append(_row(variant.name, student, scores, result.student_seconds, result))
        images[variant.name] = result.student_images
        comparisons[variant.name] = result
    return DemoResult(tuple(rows), prompts, images, comparisons)


def judge_scorer() -> "JudgeScorer":
    """The embedded judge as a scorer of `evaluate`."""
    return JudgeScorer(Judge.from_package())


@dataclasses.dataclass(frozen=True)
class JudgeScorer:
    """Scores pixel people for `evaluate`: attribute accuracy, and the share of images with all attributes right."""

    judge: Judge

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
        """See [`Judge.attribute_accuracy`]."""
        accuracy = self.judge.attribute_accuracy(images, prompts)
        return {"attribute_accuracy": accuracy.mean, "all_attributes": accuracy.all_attributes}


def _row(
    name: str,
    pipeline: DiffusionPipeline,
    scores: Mapping[str, float],
    seconds: float,
    result: EvaluationResult | None = None,
) -> DemoRow:
    size = stored_size(pipeline.transformer)
    velocity = None if result is None else result.velocity
    return DemoRow(
        variant=name,
        bits_per_weight=size.bits_per_weight,
        bytes=size.bytes,
        attribute_accuracy=scores["attribute_accuracy"],
        all_attributes=scores["all_attributes"],
        psnr_db=None if result is None else result.psnr_db,
        velocity_nmse=None if velocity is None else velocity.overall,
        seconds=seconds,
    )
