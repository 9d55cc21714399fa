# SPDX-License-Identifier: Apache-2.0
"""`distill`: trains a ternary student on its own teacher, with prompts only."""

import dataclasses
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
from ..backend.config import TernaryConfig, given_or_default
from ..backend.reports import attach_report
from ..extras import check_extra
from ..lora import folded_adapters
from ..rollouts import check_prompts, evaluation_mode, float_dtype, make_rollouts, weights_sha256
from ..rollouts.prompts import check_disjoint, split_held_out
from .cache import TeacherCache
from .config import DistillConfig
from .engine import Trainer
from .held_out import HeldOutError
from .identity import flat, json_values
from .inputs import InputMaker, TeacherData
from .memory import available_memory, check_memory, observed_tokens
from .noise import NoiseProcess, observe_noise
from .online import TeacherPool
from .progress import Progress
from .recording import TeacherRecorder
from .report import DistillReport
from .run_folder import check_run, load_student, own_run, recover_run, save_student, start_run
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
            Float pipeline. It is not changed; its denoiser is moved to the training device. To distill a fine-tune,
            fold its LoRA files in first ([`~lora.fold_adapters`]).
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
    config = given_or_default("config", config, TernaryConfig)
    distill_config = given_or_default("distill_config", distill_config, DistillConfig)
    component = teacher_component(teacher_pipeline, config)
    teacher = teacher_pipeline.components[component]
    if distill_config.optimizer == "adamw8bit":
        check_extra("bitsandbytes", "optimizer='adamw8bit'")
    start = None if student is None else given_student(student, component, teacher)
    training, held_out = _recorders(teacher_pipeline, component, prompts, held_out_prompts, distill_config)
    folder = pathlib.Path(output_dir)
    accelerator = accelerator or _make_accelerator(distill_config, teacher, folder)
    parts = teacher_pipeline.components.values()
    with own_run(folder, main_process=accelerator.is_main_process), evaluation_mode(parts):
        run = _Run(
            training,
            held_out,
            start,
            config,
            distill_config,
            folder,
            pathlib.Path(cache_dir) if cache_dir is not None else folder / "cache",
            accelerator,
        )
        trained = run.finish(show_progress=progress)
        report = DistillReport.load_json(folder / _REPORT)
    return attach_report(with_denoiser(teacher_pipeline, component, trained), report, return_report)


def _recorders(
    pipeline: DiffusionPipeline,
    component: str,
    prompts: Sequence[str],
    held_out: Sequence[str] | None,
    config: DistillConfig,
) -> tuple[TeacherRecorder, TeacherRecorder]:
    """What draws the training and the held-out trajectories, checked."""
    if held_out is None:
        prompts, held_out = split_held_out(check_prompts(prompts), config.held_out)
    rows, call = config.batch_size, config.call_kwargs
    training = make_rollouts(pipeline, prompts, seed=config.seed * _SEED_STRIDE, batch_size=rows, call_kwargs=call)
    unseen = make_rollouts(pipeline, held_out or (), seed=_HELD_OUT_SEED, batch_size=rows, call_kwargs=call)
    check_disjoint(training.prompts, unseen.prompts)
    return TeacherRecorder(pipeline, component, training), TeacherRecorder(pipeline, component, unseen)


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


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run in a folder that is its own.

    Args:
        training, held_out ([`TeacherRecorder`]): the teacher with the prompts of either kind.
        start (`nn.Module`, *optional*): packed student to start from; `None` = made of the teacher.
        config ([`TernaryConfig`]), distill_config ([`DistillConfig`]): how.
        folder (`pathlib.Path`): of the run.
        caches (`pathlib.Path`): where the teacher's latents are kept.
        accelerator (`Accelerator`): device, processes, precision and trackers.
    """

    training: TeacherRecorder
    held_out: TeacherRecorder
    start: nn.Module | None
    config: TernaryConfig
    distill_config: DistillConfig
    folder: pathlib.Path
    caches: pathlib.Path
    accelerator: Accelerator

    def finish(self, *, show_progress: bool) -> nn.Module:
        """Trains until `best/` and the report are in the folder, unless they are there; returns the best student."""
        accelerator, teacher = self.accelerator, self.training.denoiser
        identity = self._identity()
        # Before anything is written, and in all processes before the first of them writes.
        check_run(self.folder, identity)
        if accelerator.is_main_process:
            recover_run(self.folder)
        accelerator.wait_for_everyone()
        if (self.folder / _REPORT).is_file():
            return load_student(self.folder / "best", teacher, accelerator.device)
        teacher.to(accelerator.device)
        noise = self._observe_noise()
        if accelerator.is_main_process:
            start_run(self.folder, identity)
            self._make_start()
        accelerator.wait_for_everyone()
        data = self._training_data()
        inputs = InputMaker(
            data,
            noise,
            self.distill_config,
            random_guidance=bool(getattr(teacher.config, "guidance_embeds", False)),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        held_out = HeldOutError(
            self._cache(self.held_out, "held_out"),
            noise,
            teacher,
            batch_size=self.distill_config.batch_size,
            device=accelerator.device,
        )
        if self.distill_config.trackers:
            accelerator.init_trackers("diffusers-ternary", config=flat(json_values(self.distill_config.to_dict())))
        student = load_student(self.folder / "start", teacher, accelerator.device)
        trainer = Trainer(
            accelerator,
            teacher,
            student,
            inputs=inputs,
            held_out=held_out,
            config=self.distill_config,
            folder=self.folder,
            show_progress=show_progress,
        )
        result = trainer.run()
        if isinstance(data, TeacherPool):
            data.close()
        for tracker in accelerator.trackers:
            tracker.finish()  # not end_training(): the process group is the caller's
        if accelerator.is_main_process:
            self._report(trainer.student, result, identity).save_json(self.folder / _REPORT)
        accelerator.wait_for_everyone()
        return trainer.student

    def _identity(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        settings = {name: v for name, v in self.distill_config.to_dict().items() if name not in _WITHOUT_EFFECT}
        identity = {
            "teacher": self.training.weights_sha256(),
            "student": None if self.start is None else weights_sha256({"student": self.start}),
            "training_prompts": self.training.rollouts.sha256(),
            "held_out_prompts": self.held_out.rollouts.sha256(),
            "config": self.config.to_dict() if self.start is None else None,
            "distill_config": settings,
            "processes": self.accelerator.num_processes,
            "version": importlib.metadata.version("diffusers-ternary"),
        }
        return flat(json_values(identity))

    def _observe_noise(self) -> NoiseProcess:
        """The pipeline's noise process, from a trajectory that also tells whether the run fits into memory."""
        teacher, config = self.training.denoiser, self.distill_config
        with observed_tokens(teacher) as tokens:
            noise = observe_noise(
                self.held_out.pipeline,
                teacher,
                self.held_out.rollouts,
                timesteps=config.timesteps,
                uniform_fraction=config.uniform_fraction,
            )
        check_memory(
            teacher,
            self.config,
            config,
            tokens=tokens[0],
            available=available_memory(self.accelerator.device, teacher),
            shards=self.accelerator.num_processes if self.accelerator.is_fsdp2 else 1,
        )
        return noise

    def _make_start(self) -> None:
        """Stores the student that training starts from, unless an earlier call has done it."""
        if (self.folder / "start").exists():
            return
        start = self.start
        if start is None:
            work = self.folder / "calibration"
            start = make_student(self.training, self.config, self.distill_config, work_dir=work)
        save_student(start, self.folder / "start")

    def _training_data(self) -> TeacherData:
        size = self.distill_config.online_pool
        if not size:
            return self._cache(self.training, "training")
        rollouts = self.training.rollouts
        first = self.accelerator.process_index * _POOL_SEED_STRIDE  # a pool for each process, of other noise
        rollouts = dataclasses.replace(
            rollouts,
            seeds=tuple(first + seed for seed in rollouts.seeds),
            batch_size=math.gcd(size, rollouts.batch_size),
        )
        return TeacherPool(dataclasses.replace(self.training, rollouts=rollouts), size)

    def _cache(self, recorder: TeacherRecorder, name: str) -> TeacherCache:
        processes = {"process": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        cache = TeacherCache.build(recorder, self.caches / name, **processes)
        self.accelerator.wait_for_everyone()
        return cache

    def _report(self, student: nn.Module, progress: Progress, identity: Mapping[str, Any]) -> DistillReport:
        versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
        return DistillReport(
            start_error=progress.history[0].held_out,
            best_error=progress.best.held_out,
            best_step=progress.best.step,
            steps=progress.step,
            stopped=progress.stopped,
            history=tuple(progress.history),
            bits_per_weight=bits_per_weight({name: layer.spec for name, layer in packed_layers(student).items()}),
            trained_parameters=progress.trained,
            teacher_sha256=identity["teacher"],
            training_prompts_sha256=identity["training_prompts"],
            held_out_prompts_sha256=identity["held_out_prompts"],
            seconds=progress.seconds,
            cpu_seconds=progress.cpu_seconds,
            processes=self.accelerator.num_processes,
            config=self.config.to_dict(),
            distill_config=self.distill_config.to_dict(),
            versions={**versions, "python": platform.python_version(), "device": str(self.accelerator.device)},
            adapters=folded_adapters(self.training.pipeline),
        )
