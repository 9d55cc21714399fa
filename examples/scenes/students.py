# SPDX-License-Identifier: Apache-2.0
"""Ternary students of a Scenes teacher: how the benchmark's table and the shipped model calibrate and distill.

No prompt used here is one that the benchmark asks for, and none is used for two purposes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate
from diffusers_ternary.calibration import CalibrationReport, SensitivityConfig
from diffusers_ternary.distillation import DistillConfig, distill
from diffusers_ternary.evaluation.scenes.call import scenes_call
from diffusers_ternary.evaluation.scenes.prompts import tuning_prompts


CALIBRATION, TRAINING, HELD_BACK = 100, 200, 300  # seeds of the prompts of each purpose
BATCH_SIZE = 64
# At widths of 256 a correction of rank 16 costs a bit per weight or more: smaller groups and int8 are offered.
SENSITIVITY = SensitivityConfig(prompts=4, steps=4, group_sizes=(64, 32), ranks=())
# The timesteps of the pipeline itself, half of the rows being states of the teacher's own trajectories.
RECIPE: dict[str, Any] = {"batch_size": 32, "timesteps": "schedule", "rollout_fraction": 0.5}


def calibrate_student(
    pipeline: DiffusionPipeline,
    *,
    prompts: int,
    config: TernaryConfig | None = None,
    work_dir: Path | None = None,
    **settings: Any,
) -> CalibrationReport:
    """Calibrate a teacher in place for the benchmark's call.

    Args:
        pipeline: The teacher; its transformer is packed afterward.
        prompts: How many.
        config: How to pack; weights only, if not given.
        work_dir: Where finished layers are kept.
        settings: Further arguments of ``CalibrationConfig``.
    """
    if settings.get("size_budget") is not None:
        settings.setdefault("sensitivity", SENSITIVITY)
    calibration = CalibrationConfig(
        batch_size=BATCH_SIZE, seed=1_000_000, call_kwargs=scenes_call(pipeline), **settings
    )
    config = config or TernaryConfig(activation_dtype="none")
    calibrate(pipeline, tuning_prompts(prompts, CALIBRATION), config, calibration, work_dir=work_dir)
    return pipeline.ternary_report


def distill_student(
    teacher: DiffusionPipeline,
    student: nn.Module,
    output: Path,
    *,
    mode: str,
    steps: int,
    prompts: int,
    held_back: int = 64,
    cache_dir: Path | None = None,
    **settings: Any,
) -> DiffusionPipeline:
    """Distill a calibrated student for the benchmark's call; a run that was interrupted goes on.

    Args:
        teacher: The float pipeline; not changed.
        student: Its packed transformer, calibrated.
        output: Folder of the run.
        mode: Of ``DistillConfig``.
        steps: Updates.
        prompts: Training prompts.
        held_back: Prompts that choose the best checkpoint.
        cache_dir: Folder of the teacher's latents, for runs on the same prompts to share.
        settings: Further arguments of ``DistillConfig``.
    """
    unseen = list(dict.fromkeys(tuning_prompts(held_back, HELD_BACK)))
    training = [prompt for prompt in tuning_prompts(prompts, TRAINING) if prompt not in set(unseen)]
    config = DistillConfig(
        mode=mode, updates=steps, call_kwargs=scenes_call(teacher), calibration=None, **{**RECIPE, **settings}
    )
    return distill(
        teacher,
        training,
        TernaryConfig(activation_dtype="none"),
        config,
        output,
        student=student,
        held_out_prompts=unseen,
        cache_dir=cache_dir,
    )
