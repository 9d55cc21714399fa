# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline on prompts and observes its denoiser: what calibration, distillation and evaluation share."""

from .calls import (
    DenoiserCall,
    map_tensors,
    named_arguments,
    prediction_of,
    recorded_calls,
    sample_name,
    timestep_name,
    timestep_of,
)
from .fingerprint import fingerprint, weights_sha256
from .rollouts import RolloutBatch, Rollouts, make_rollouts, prepared, returns_latents


__all__ = [
    "DenoiserCall",
    "RolloutBatch",
    "Rollouts",
    "fingerprint",
    "make_rollouts",
    "map_tensors",
    "named_arguments",
    "prediction_of",
    "prepared",
    "recorded_calls",
    "returns_latents",
    "sample_name",
    "timestep_name",
    "timestep_of",
    "weights_sha256",
]
