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

from ..backend import below_compiled_wrappers
from ..backend.components import denoiser_of
from ..extras import check_extra
from ..progress import Bar
from ..rollouts import (
    DenoiserCall,
    Rollouts,
    VelocityError,
    check_call,
    check_prompts,
    draw_images,
    image_size,
    prepared,
    recorded_calls,
    velocity_error,
)
from .benchmarks import make_benchmark
from .comparable import check_comparable
from .judgement import Benchmark, BenchmarkScores, check_image_size, judge_all
from .metrics import COMPARISON, check_same_size, image_distance
from .result import BenchmarkPair, EvaluationResult, ScorePair


Scorer = Callable[[Sequence[Image.Image], Sequence[str]], "float | Mapping[str, float]"]
_VERSIONED = ("diffusers-ternary", "diffusers", "transformers", "torch", "torchmetrics")


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """What the teacher drew, and how: everything that a student is compared with.

    Args:
        teacher (`DiffusionPipeline`): as given.
        rollouts ([`Rollouts`]): prompts, seeds and call arguments.
        images (`tuple[PIL.Image.Image, ...]`): RGB, one per prompt.
        seconds (`float`): wall time of the pipeline calls.
        calls (`tuple[DenoiserCall, ...]`): recorded calls of the denoiser.
        recorded_prompts (`int`): prompts behind `calls`.
        scorers (`Mapping[str, Scorer]`): applied to the student's images too.
        scores (`dict[str, float]`): the teacher's.
        benchmark ([`Benchmark`], *optional*): judges the student's images too.
        benchmark_scores ([`BenchmarkScores`], *optional*): the teacher's.
    """

    teacher: DiffusionPipeline
    rollouts: Rollouts
    images: tuple[Image.Image, ...]
    seconds: float
    calls: tuple[DenoiserCall, ...]
    recorded_prompts: int
    scorers: Mapping[str, Scorer]
    scores: dict[str, float]
    benchmark: Benchmark | None = None
    benchmark_scores: BenchmarkScores | None = None


@below_compiled_wrappers
def evaluate(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    *,
    benchmark: str | Benchmark | None = None,
    benchmark_options: Mapping[str, Any] | None = None,
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
        prompts (`Sequence[str]`, *optional*):
            One image is drawn for each. Not with a benchmark, which brings its own.
        benchmark (`str` or [`Benchmark`], *optional*):
            `"scenes"`, `"geneval"` or `"t2i-compbench"`: images of each of its prompts are drawn and judged, see
            [`Scenes`], [`GenEval`] and [`T2ICompBench`]. All images are held in memory until the comparison is done.
        benchmark_options (`Mapping[str, Any]`, *optional*):
            Options of the benchmark's class, e.g. `{"detector": "folder", "images_per_prompt": 1}`.
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
        ValueError: for no or empty prompts, an unknown benchmark or a checkpoint of it that cannot be loaded, a wrong
            number of seeds, pipelines that differ in architecture, scheduler or image size, or call arguments that
            the pipeline does not take.
    """
    judge = _benchmark(benchmark, benchmark_options, prompts)
    if judge is not None:
        prompts = [prompt for prompt in judge.prompts for _ in range(judge.images_per_prompt)]
    prompts = check_prompts(prompts or ())
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    call = _call(call_kwargs, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    rollouts = Rollouts(prompts, tuple(seeds), call, batch_size)
    check_comparable(student, teacher)
    run = observe_teacher(
        teacher,
        rollouts,
        scorers=scorers,
        benchmark=judge,
        velocity_prompts=velocity_prompts,
        progress=progress,
    )
    return compare(student, run, progress=progress)


def observe_teacher(
    teacher: DiffusionPipeline,
    rollouts: Rollouts,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    benchmark: Benchmark | None = None,
    velocity_prompts: int = 8,
    progress: bool = True,
) -> TeacherRun:
    """The teacher's half of [`evaluate`], to be compared with several students."""
    if not isinstance(velocity_prompts, int) or velocity_prompts < 0:
        raise ValueError(f"velocity_prompts={velocity_prompts!r} is not a number of prompts (0 = no velocity error).")
    check_call(teacher, rollouts.call_kwargs)
    check_extra("torchmetrics", COMPARISON)
    denoiser, name = denoiser_of(teacher), type(teacher).__name__
    if benchmark is not None:
        check_image_size(benchmark, image_size(teacher, rollouts.call_kwargs), pipeline=name)
    images: list[Image.Image] = []
    calls: list[DenoiserCall] = []
    recorded = 0
    seconds = 0.0
    with prepared(teacher):
        for batch in Bar(list(rollouts.batches()), "teacher draws", visible=progress):
            start = time.perf_counter()
            if recorded < velocity_prompts:
                with recorded_calls(denoiser) as new_calls:
                    images += draw_images(teacher, batch, rollouts.call_kwargs)
                calls += new_calls
                recorded += len(batch.prompts)
            else:
                images += draw_images(teacher, batch, rollouts.call_kwargs)
            seconds += time.perf_counter() - start
            if benchmark is not None:  # of pipelines that round what they are asked for
                check_image_size(benchmark, images[-1].size, pipeline=name)
    scorers = dict(scorers or {})
    scores = _score(scorers, images, rollouts.prompts)
    judged = _judge(benchmark, images, "teacher", progress)
    return TeacherRun(
        teacher, rollouts, tuple(images), seconds, tuple(calls), recorded, scorers, scores, benchmark, judged
    )


def compare(student: DiffusionPipeline, run: TeacherRun, *, progress: bool = True) -> EvaluationResult:
    """The student's half of [`evaluate`]."""
    check_comparable(student, run.teacher)
    rollouts = run.rollouts
    images: list[Image.Image] = []
    seconds = 0.0
    with prepared(student):
        for batch in Bar(list(rollouts.batches()), "student draws", visible=progress):
            start = time.perf_counter()
            images += draw_images(student, batch, rollouts.call_kwargs)
            seconds += time.perf_counter() - start
            check_same_size(images[-1], run.images[len(images) - 1])
    distance = image_distance(
        images, run.images, wrap=lambda pairs: Bar(pairs, "distances of the images", visible=progress)
    )
    scores = _score(run.scorers, images, rollouts.prompts)
    return EvaluationResult(
        prompts=rollouts.prompts,
        seeds=rollouts.seeds,
        call_kwargs=dict(rollouts.call_kwargs),
        student_images=tuple(images),
        teacher_images=run.images,
        psnr_db=distance.psnr_db,
        psnr_per_image=distance.psnr_per_image,
        ssim=distance.ssim,
        lpips=distance.lpips,
        unavailable=distance.unavailable,
        velocity=_velocity(student, run, progress),
        scores={name: ScorePair(scores[name], run.scores[name]) for name in run.scores},
        benchmark=_benchmark_pair(run, _judge(run.benchmark, images, "student", progress)),
        student_seconds=seconds,
        teacher_seconds=run.seconds,
        pipeline=type(student).__name__,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _benchmark(
    benchmark: str | Benchmark | None, options: Mapping[str, Any] | None, prompts: Sequence[str] | None
) -> Benchmark | None:
    if benchmark is None:
        if options:
            raise ValueError(f"benchmark_options={dict(options)} without a benchmark. Give benchmark= as well.")
        return None
    if prompts is not None:
        raise ValueError("A benchmark brings its own prompts. Give prompts or benchmark, not both.")
    if isinstance(benchmark, str):
        return make_benchmark(benchmark, **(options or {}))
    if options:
        raise ValueError("benchmark_options belong to a benchmark given by name; this one is made already.")
    return benchmark


def _call(call_kwargs: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """The arguments of the pipeline calls; those with names of their own may be given in one of the two places."""
    merged = dict(call_kwargs or {})
    for name, value in named.items():
        if value is not None and name in merged:
            raise ValueError(f"{name} is given twice: {value} and, in call_kwargs, {merged[name]}. Give it once.")
        if value is not None:
            merged[name] = value
    return merged


def _judge(
    benchmark: Benchmark | None, images: Sequence[Image.Image], role: str, visible: bool
) -> BenchmarkScores | None:
    if benchmark is None:
        return None
    return judge_all(
        benchmark, images, wrap=lambda each: Bar(each, f"{benchmark.name} judges the {role}", visible=visible)
    )


def _benchmark_pair(run: TeacherRun, student: BenchmarkScores | None) -> BenchmarkPair | None:
    if run.benchmark is None or run.benchmark_scores is None or student is None:
        return None
    return BenchmarkPair(run.benchmark.name, student, run.benchmark_scores)


def _velocity(student: DiffusionPipeline, run: TeacherRun, visible: bool) -> VelocityError | None:
    if not run.calls:
        return None
    teacher_dtype = getattr(denoiser_of(run.teacher), "dtype", torch.float32)
    with prepared(student):
        calls = Bar(run.calls, "student's velocity error", visible=visible)
        error = velocity_error(denoiser_of(student), calls, teacher_dtype=teacher_dtype, prompts=run.recorded_prompts)
    student.maybe_free_model_hooks()  # an offloaded denoiser goes back to where it was
    return error


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
