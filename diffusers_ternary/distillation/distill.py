# SPDX-License-Identifier: Apache-2.0
"""`distill`: trains a ternary student on its own teacher, with prompts only."""

import importlib.metadata
import math
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline
from torch import nn

from ..backend import below_compiled_wrappers, bits_per_weight, packed_layers, with_separate_projections
from ..backend.config import TernaryConfig
from ..backend.reports import attach_report
from ..extras import check_extra
from ..files import new_folder
from ..rollouts import Rollouts, check_prompts, evaluation_mode, make_rollouts, weights_sha256
from ..rollouts.prompts import check_disjoint, split_held_out
from .cache import TeacherCache
from .config import DistillConfig
from .engine import Trainer
from .held_out import HeldOutError, float_dtype
from .inputs import InputMaker
from .memory import available_memory, check_memory, observed_tokens
from .noise import observe_noise
from .online import TeacherPool
from .progress import Progress
from .report import DistillReport
from .run_folder import check_run, flat, own_run, recover_run, start_run
from .start import StudentSource, given_student, make_student, teacher_component, with_denoiser


_VERSIONED = ("diffusers-ternary", "diffusers", "transformers", "accelerate", "torch")
_REPORT = "distill.json"
# Training prompt i of seed s starts from the noise of s * stride + i, held-out prompts from noise beyond all of these.
_SEED_STRIDE = 1_000_000
_HELD_OUT_SEED = 1 << 60
_POOL_SEED_STRIDE = 1 << 40
# Settings that change how a run is watched, not what comes of it.
_WITHOUT_EFFECT = ("trackers", "checkpoint_every")


@below_compiled_wrappers
@with_separate_projections
def distill(
    teacher_pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    config: TernaryConfig | None = None,
    distill_config: DistillConfig | None = None,
    output_dir: str | os.PathLike[str] = "run",
    *,
    student: StudentSource | None = None,
    held_out_prompts: Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    return_report: bool = False,
) -> Any:
    """Trains a ternary student to predict what its float teacher predicts. No images: the teacher draws the data.

    The teacher's latents for the prompts are cached with the pipeline's own scheduler, guidance and resolution. The
    student, packed by `calibrate` (or given), is trained on noised latents and on states of the teacher's own
    trajectories; see [`DistillConfig`] for what is trained and how. All that is evaluated, kept and returned is the
    packed student, not the latents behind it. A killed run goes on from its latest checkpoint when it is called again
    with the same arguments, and ends with the same weights.

    Started by `accelerate launch`, all processes train together (DDP, FSDP2); every process has to make the call.

    Args:
        teacher_pipeline (`DiffusionPipeline`):
            Float pipeline. It is not changed; its denoiser is moved to the training device.
        prompts (`Sequence[str]`):
            2,000 or more that cover what the model is to draw.
        config ([`TernaryConfig`], *optional*):
            How the student is packed. Not used if a student is given.
        distill_config ([`DistillConfig`], *optional*):
            What is trained, for how long, and how.
        output_dir (`str` or `os.PathLike`, *optional*, defaults to `"run"`):
            Folder of the run: `best/` (the packed denoiser), `distill.json` (the [`DistillReport`]), `checkpoints/`,
            `cache/`.
        student (`DiffusionPipeline`, `nn.Module`, `str` or `os.PathLike`, *optional*):
            A packed student to start from: pipeline, denoiser or folder. It is not changed.
        held_out_prompts (`Sequence[str]`, *optional*):
            Prompts for the evaluation during the run; default: `held_out` of `prompts`, chosen by their hash, which
            are then not trained on.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of the teacher's latents, to share it between runs; default: inside `output_dir`. With
            `online_pool`, only those of the held-out prompts are kept.
        accelerator (`Accelerator`, *optional*):
            Default: made from `distill_config` and the environment.
        progress (`bool`, *optional*, defaults to `True`):
            Show progress bars.
        return_report (`bool`, *optional*, defaults to `False`):
            Return the report beside the pipeline.

    Returns:
        `DiffusionPipeline`: the teacher's other parts with the packed student that had the lowest held-out error. Its
        `ternary_report` is the [`DistillReport`]. With `return_report`, `(pipeline, report)`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a quantized teacher, a student of another architecture, held-out prompts that are trained on,
            a scheduler or call that cannot be distilled, a cache or an output folder of other settings.
        FileExistsError: if `output_dir` holds something else than a run.
        BlockingIOError: if another distillation is using `output_dir`, or drawing the same cache.
        MissingExtraError: without bitsandbytes, if `optimizer="adamw8bit"` asks for it.
        MemoryError: if the run cannot fit.
    """
    config, distill_config = config or TernaryConfig(), distill_config or DistillConfig()
    component = teacher_component(teacher_pipeline, config)
    teacher = teacher_pipeline.components[component]
    if distill_config.optimizer == "adamw8bit":
        check_extra("bitsandbytes", "optimizer='adamw8bit'")
    start = None if student is None else given_student(student, component, teacher)
    training, held_out = _split(teacher_pipeline, prompts, held_out_prompts, distill_config)
    folder = pathlib.Path(output_dir)
    accelerator = accelerator or _make_accelerator(distill_config, teacher, folder)
    parts = teacher_pipeline.components.values()
    with own_run(folder, main_process=accelerator.is_main_process), evaluation_mode(parts):
        trained = _distill(
            teacher_pipeline,
            component,
            start,
            training,
            held_out,
            config,
            distill_config,
            folder,
            pathlib.Path(cache_dir) if cache_dir is not None else folder / "cache",
            accelerator,
            progress=progress,
        )
    report = DistillReport.load_json(folder / _REPORT)
    return attach_report(with_denoiser(teacher_pipeline, component, trained), report, return_report)


def _distill(
    teacher_pipeline: DiffusionPipeline,
    component: str,
    start: nn.Module | None,
    training: Rollouts,
    held_out: Rollouts,
    config: TernaryConfig,
    distill_config: DistillConfig,
    folder: pathlib.Path,
    caches: pathlib.Path,
    accelerator: Accelerator,
    *,
    progress: bool,
) -> nn.Module:
    """The run itself, in a folder that is its own; returns the best student."""
    teacher = teacher_pipeline.components[component]
    identity = _identity(teacher_pipeline, config, distill_config, training, held_out, start, accelerator)
    # Before anything is written, and in all processes before the first of them writes.
    check_run(folder, identity)
    if accelerator.is_main_process:
        recover_run(folder)
    accelerator.wait_for_everyone()
    if (folder / _REPORT).is_file():  # the run has ended before
        return _load(teacher, folder / "best", accelerator)
    teacher.to(accelerator.device)
    with observed_tokens(teacher) as tokens:
        noise = observe_noise(
            teacher_pipeline,
            teacher,
            held_out,
            timesteps=distill_config.timesteps,
            uniform_fraction=distill_config.uniform_fraction,
        )
    check_memory(
        teacher,
        config,
        distill_config,
        tokens=tokens[0],
        available=available_memory(accelerator.device, teacher),
        shards=accelerator.num_processes if accelerator.is_fsdp2 else 1,
    )
    if accelerator.is_main_process:
        start_run(folder, identity)
        if not (folder / "start").exists():
            if start is None:
                work = folder / "calibration"
                start = make_student(
                    teacher_pipeline, component, training.prompts, config, distill_config, work_dir=work
                )
            _save_start(start, folder)
    accelerator.wait_for_everyone()
    data: TeacherCache | TeacherPool
    if distill_config.online_pool:
        data = _pool(teacher_pipeline, training, distill_config.online_pool, component, accelerator)
    else:
        data = _cache(teacher_pipeline, training, caches / "training", component, accelerator)
    unseen = _cache(teacher_pipeline, held_out, caches / "held_out", component, accelerator)
    if distill_config.trackers:
        accelerator.init_trackers("diffusers-ternary", config=flat(distill_config.to_dict()))
    trainer = Trainer(
        accelerator,
        teacher,
        _load(teacher, folder / "start", accelerator),
        inputs=InputMaker(
            data,
            noise,
            distill_config,
            random_guidance=bool(getattr(teacher.config, "guidance_embeds", False)),
            listed=data.layout.listed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        held_out=HeldOutError(
            unseen,
            noise,
            teacher,
            batch_size=distill_config.batch_size,
            device=accelerator.device,
            listed=unseen.layout.listed,
        ),
        config=distill_config,
        folder=folder,
        show_progress=progress,
    )
    result = trainer.run()
    if isinstance(data, TeacherPool):
        data.close()
    for tracker in accelerator.trackers:
        tracker.finish()  # not end_training(): the process group is the caller's
    if accelerator.is_main_process:
        report = _report(trainer.student, result, identity, config, distill_config, accelerator)
        report.save_json(folder / _REPORT)
    accelerator.wait_for_everyone()
    return trainer.student


def _split(
    pipeline: DiffusionPipeline, prompts: Sequence[str], held_out: Sequence[str] | None, config: DistillConfig
) -> tuple[Rollouts, Rollouts]:
    """Training and held-out trajectories, checked."""
    if held_out is None:
        prompts, held_out = split_held_out(check_prompts(prompts), config.held_out)
    rows, call = config.batch_size, config.call_kwargs
    training = make_rollouts(pipeline, prompts, seed=config.seed * _SEED_STRIDE, batch_size=rows, call_kwargs=call)
    unseen = make_rollouts(pipeline, held_out or (), seed=_HELD_OUT_SEED, batch_size=rows, call_kwargs=call)
    check_disjoint(training.prompts, unseen.prompts)
    return training, unseen


def _make_accelerator(config: DistillConfig, teacher: nn.Module, folder: pathlib.Path) -> Accelerator:
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in config.trackers:  # accelerate leaves out what is not installed, without a word
        if name in LoggerType and name not in installed:
            check_extra(name, f"The tracker {name}")
    precision = config.mixed_precision
    if precision is None and float_dtype(teacher) != torch.float32:
        precision = "bf16"  # float32 masters of a 16-bit model need autocast
    # Without the blocks' error, what only feeds the blocks' second outputs has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.block_weight == 0)
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.trackers) or None,
        project_dir=folder,  # some trackers write files
        kwargs_handlers=[unused],
    )


def _identity(
    pipeline: DiffusionPipeline,
    config: TernaryConfig,
    distill_config: DistillConfig,
    training: Rollouts,
    held_out: Rollouts,
    start: nn.Module | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    settings = distill_config.to_dict()
    for name in _WITHOUT_EFFECT:
        settings.pop(name)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return flat(
        {
            "teacher": weights_sha256(modules),
            "student": None if start is None else weights_sha256({"student": start}),
            "training_prompts": training.sha256(),
            "held_out_prompts": held_out.sha256(),
            "config": config.to_dict() if start is None else None,
            "distill_config": settings,
            "processes": accelerator.num_processes,
            "version": importlib.metadata.version("diffusers-ternary"),
        }
    )


def _save_start(student: nn.Module, folder: pathlib.Path) -> None:
    with new_folder(folder / "start") as temporary:
        student.save_pretrained(temporary)  # type: ignore[operator]


def _load(teacher: nn.Module, folder: pathlib.Path, accelerator: Accelerator) -> nn.Module:
    student = type(teacher).from_pretrained(folder, dtype=float_dtype(teacher))  # type: ignore[attr-defined]
    return student.to(accelerator.device).eval()


def _cache(
    pipeline: DiffusionPipeline, rollouts: Rollouts, folder: pathlib.Path, component: str, accelerator: Accelerator
) -> TeacherCache:
    cache = TeacherCache.build(
        pipeline,
        rollouts.prompts,
        folder=folder,
        call_kwargs=rollouts.call_kwargs,
        seed=rollouts.seed,
        batch_size=rollouts.batch_size,
        component=component,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    return cache


def _pool(
    pipeline: DiffusionPipeline, rollouts: Rollouts, size: int, component: str, accelerator: Accelerator
) -> TeacherPool:
    """A pool for each process, of other noise."""
    return TeacherPool(
        pipeline,
        rollouts.prompts,
        call_kwargs=rollouts.call_kwargs,
        seed=rollouts.seed + accelerator.process_index * _POOL_SEED_STRIDE,
        size=size,
        batch_size=math.gcd(size, rollouts.batch_size),
        component=component,
    )


def _report(
    student: nn.Module,
    progress: Progress,
    identity: Mapping[str, Any],
    config: TernaryConfig,
    distill_config: DistillConfig,
    accelerator: Accelerator,
) -> DistillReport:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return DistillReport(
        start_error=progress.history[0].held_out,
        best_error=progress.best.held_out,
        best_step=progress.best.step,
        steps=progress.step,
        stopped=progress.stopped,
        history=progress.history,
        bits_per_weight=bits_per_weight({name: layer.spec for name, layer in packed_layers(student).items()}),
        trained_parameters=progress.trained,
        teacher_sha256=identity["teacher"],
        training_prompts_sha256=identity["training_prompts"],
        held_out_prompts_sha256=identity["held_out_prompts"],
        seconds=progress.seconds,
        cpu_seconds=progress.cpu_seconds,
        processes=accelerator.num_processes,
        config=config.to_dict(),
        distill_config=distill_config.to_dict(),
        versions={**versions, "python": platform.python_version(), "device": str(accelerator.device)},
    )
