# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline on prompts and observes its denoiser: what calibration, distillation and evaluation share."""

from .calls import (
    DenoiserCall,
    float_dtype,
    map_tensors,
    named_arguments,
    prediction_of,
    recorded_calls,
    sample_name,
    timestep_name,
    timestep_of,
)
from .drawing import (
    RolloutBatch,
    check_call,
    check_prompts,
    draw,
    draw_images,
    evaluation_mode,
    image_size,
    prepared,
    takes_output_type,
)
from .fingerprint import fingerprint, prompts_sha256, weights_sha256
from .rollouts import Rollouts, make_rollouts
from .velocity import VelocityError, normalized_error, velocity_error


__all__ = [
    "DenoiserCall",
    "RolloutBatch",
    "Rollouts",
    "VelocityError",
    "check_call",
    "check_prompts",
    "draw",
    "draw_images",
    "evaluation_mode",
    "fingerprint",
    "float_dtype",
    "image_size",
    "make_rollouts",
    "map_tensors",
    "named_arguments",
    "normalized_error",
    "prediction_of",
    "prepared",
    "prompts_sha256",
    "recorded_calls",
    "sample_name",
    "takes_output_type",
    "timestep_name",
    "timestep_of",
    "velocity_error",
    "weights_sha256",
]
