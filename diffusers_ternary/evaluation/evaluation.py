# SPDX-License-Identifier: Apache-2.0
"""`evaluate`, and its two halves: observing the teacher once, and comparing any number of students with it."""

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..quantizers import below_compiled_wrappers
from ..rollouts import DenoiserCall, RolloutBatch, prepared, recorded_calls
from .comparable import check_comparable, denoiser_of
from .metrics import check_same_size, image_distance
from .result import EvaluationResult, ScorePair
from .sampling import Sampling, draw_images, make_sampling
from .velocity import VelocityError, velocity_error


Scorer = Callable[[Sequence[Image.Image], Sequence[str]], "float | Mapping[str, float]"]
_VERSIONED = ("diffusers-ternary", "diffusers", "transformers", "torch", "torchmetrics")


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """What the teacher drew, and how: everything that a student is compared with.

    Args:
        teacher (`DiffusionPipeline`): as given.
        sampling ([`Sampling`]): prompts, seeds and call arguments.
        images (`tuple[PIL.Image.Image, ...]`): RGB, one per prompt.
        seconds (`float`): wall time of the pipeline calls.
        calls (`tuple[DenoiserCall, ...]`): recorded calls of the denoiser.
        recorded_prompts (`int`): prompts behind `calls`.
        scorers (`Mapping[str, Scorer]`): applied to the student's images too.
        scores (`dict[str, float]`): the teacher's.
    """

    teacher: DiffusionPipeline
    sampling: Sampling
    images: tuple[Image.Image, ...]
    seconds: float
    calls: tuple[DenoiserCall, ...]
    recorded_prompts: int
    scorers: Mapping[str, Scorer]
    scores: dict[str, float]


@below_compiled_wrappers
def evaluate(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    batch_size: int = 1,
    velocity_prompts: int = 8,
    progress: bool = True,
) -> EvaluationResult:
    """Draws the same prompts with the same seeds from both pipelines, and measures how far the student is off.

    Reports the distance of the images (PSNR, SSIM, LPIPS where its weights are on this machine), the error of the
    denoiser along the teacher's trajectories, and the scorers' view of both. Use prompts that the student was not
    trained on. Neither pipeline is changed; a pipeline may be compared with itself.

    Args:
        student, teacher (`DiffusionPipeline`):
            Text-to-image pipelines of one class, whose denoiser is `transformer` or `unet`, with the same
            architecture and scheduler.
        prompts (`Sequence[str]`):
            One image is drawn for each.
        seed (`int`, *optional*, defaults to 0):
            Prompt i is drawn from the seed `seed + i`.
        seeds (`Sequence[int]`, *optional*):
            One per prompt, instead of `seed`.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*):
            Passed to both pipelines; default: the pipeline's own.
        call_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the pipeline calls, e.g. `{"height": 512, "width": 512}`.
        scorers (`Mapping[str, Scorer]`, *optional*):
            Name → callable `(images, prompts) -> float` or `-> dict[str, float]`, e.g. [`ClipScore`].
        batch_size (`int`, *optional*, defaults to 1):
            Images per pipeline call.
        velocity_prompts (`int`, *optional*, defaults to 8):
            Prompts (rounded up to whole batches) whose denoiser inputs are kept in memory and replayed through the
            student; 0 leaves the velocity error out.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar on stderr.

    Returns:
        [`EvaluationResult`]

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for no or empty prompts, a wrong number of seeds, pipelines that differ in architecture, scheduler
            or image size, or call arguments that the pipeline does not take.
    """
    sampling = make_sampling(
        prompts,
        seed=seed,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        call_kwargs=call_kwargs,
        batch_size=batch_size,
    )
    check_comparable(student, teacher)
    run = observe_teacher(teacher, sampling, scorers=scorers, velocity_prompts=velocity_prompts, progress=progress)
    return compare(student, run, progress=progress)


def observe_teacher(
    teacher: DiffusionPipeline,
    sampling: Sampling,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    velocity_prompts: int = 8,
    progress: bool = True,
) -> TeacherRun:
    """The teacher's half of [`evaluate`], to be compared with several students."""
    if not isinstance(velocity_prompts, int) or velocity_prompts < 0:
        raise ValueError(f"velocity_prompts={velocity_prompts!r} is not a number of prompts (0 = no velocity error).")
    sampling.check(teacher)
    denoiser = denoiser_of(teacher)
    images: list[Image.Image] = []
    calls: list[DenoiserCall] = []
    recorded = 0
    seconds = 0.0
    with prepared(teacher):
        for batch in _progress(sampling, "teacher", progress):
            start = time.perf_counter()
            if recorded < velocity_prompts:
                with recorded_calls(denoiser) as new_calls:
                    images += draw_images(teacher, batch, sampling.call_kwargs)
                calls += new_calls
                recorded += len(batch.prompts)
            else:
                images += draw_images(teacher, batch, sampling.call_kwargs)
            seconds += time.perf_counter() - start
    scorers = dict(scorers or {})
    scores = _score(scorers, images, sampling.prompts)
    return TeacherRun(teacher, sampling, tuple(images), seconds, tuple(calls), recorded, scorers, scores)


def compare(student: DiffusionPipeline, run: TeacherRun, *, progress: bool = True) -> EvaluationResult:
    """The student's half of [`evaluate`]."""
    check_comparable(student, run.teacher)
    sampling = run.sampling
    images: list[Image.Image] = []
    seconds = 0.0
    with prepared(student):
        for batch in _progress(sampling, "student", progress):
            start = time.perf_counter()
            images += draw_images(student, batch, sampling.call_kwargs)
            seconds += time.perf_counter() - start
            check_same_size(images[-1], run.images[len(images) - 1])
    distance = image_distance(images, run.images)
    scores = _score(run.scorers, images, sampling.prompts)
    return EvaluationResult(
        prompts=sampling.prompts,
        seeds=sampling.seeds,
        call_kwargs=dict(sampling.call_kwargs),
        student_images=tuple(images),
        teacher_images=run.images,
        psnr_db=distance.psnr_db,
        psnr_per_image=distance.psnr_per_image,
        ssim=distance.ssim,
        lpips=distance.lpips,
        unavailable=distance.unavailable,
        velocity=_velocity(student, run),
        scores={name: ScorePair(scores[name], run.scores[name]) for name in run.scores},
        student_seconds=seconds,
        teacher_seconds=run.seconds,
        pipeline=type(student).__name__,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _velocity(student: DiffusionPipeline, run: TeacherRun) -> VelocityError | None:
    if not run.calls:
        return None
    teacher_dtype = getattr(denoiser_of(run.teacher), "dtype", torch.float32)
    with prepared(student):
        error = velocity_error(
            denoiser_of(student), run.calls, teacher_dtype=teacher_dtype, prompts=run.recorded_prompts
        )
    student.maybe_free_model_hooks()  # an offloaded denoiser goes back to where it was
    return error


def _progress(sampling: Sampling, role: str, visible: bool) -> "Any":
    batches: list[RolloutBatch] = list(sampling.batches())
    console = Console(stderr=True)
    return track(batches, description=f"{role} draws", console=console, transient=True, disable=not visible)


def _score(scorers: Mapping[str, Scorer], images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, scorer in scorers.items():
        value = scorer(list(images), list(prompts))
        named = value if isinstance(value, Mapping) else {name: value}
        repeated = [key for key in named if key in scores]
        if repeated:
            raise ValueError(f"Two scorers report {', '.join(repeated)}. Let them use different names.")
        scores.update({str(key): float(number) for key, number in named.items()})
    return scores
