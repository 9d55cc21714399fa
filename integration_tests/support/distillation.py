# SPDX-License-Identifier: Apache-2.0
"""A distillation that takes seconds: a Flux pipeline 32 channels wide, a dozen prompts, a handful of updates."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.distillation import DistillConfig, distill

from .pipelines import PIPELINES


CONFIG = TernaryConfig(group_size=16, activation_dtype="none")
CALL = {"height": 8, "width": 8, "num_inference_steps": 5, "max_sequence_length": 16}
PROMPTS = tuple(f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("cat", "dog", "cup", "car"))


def teacher(*, guidance_embeds: bool = False) -> DiffusionPipeline:
    """Random weights, the same at every call."""
    pipeline = PIPELINES["flux"].build()
    torch.manual_seed(1)
    pipeline.transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    return pipeline


def settings(**changes: Any) -> DistillConfig:
    """Settings of a short run; calibration is left out."""
    defaults = {"updates": 6, "batch_size": 3, "held_out": 4, "calibration": None, "call_kwargs": CALL}
    return DistillConfig(**{**defaults, **changes})


def run(folder: Path | str, *, pipeline: DiffusionPipeline | None = None, **changes: Any) -> DiffusionPipeline:
    """Distills the tiny teacher."""
    return distill(pipeline or teacher(), PROMPTS, CONFIG, settings(**changes), folder, progress=False)


def run_until_killed(folder: Path | str, calls: int, **changes: Any) -> None:
    """The same run, in which the process kills itself at a call of the teacher's denoiser."""
    pipeline = teacher()
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.transformer.register_forward_pre_hook(count)  # also of forwards that are cut short
    run(folder, pipeline=pipeline, **changes)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
