# SPDX-License-Identifier: Apache-2.0
"""What the teacher's cache gives and the training loop takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class TeacherBatch:
    """B rows of the teacher's own data, on the CPU. No real image is in them.

    Args:
        sample (`torch.Tensor`): float32 [B, ...], x0: clean latents that the teacher drew, in the denoiser's own
            input layout (Flux: packed tokens [B, tokens, channels]).
        conditioning (`Mapping[str, Any]`): the denoiser's other keyword arguments as the pipeline passes them (text
            embeddings, pooled embeddings, guidance, position ids, ...), without the sample and the timestep. Tensors
            with a row per prompt are stacked to [B, ...]; what all prompts share (`txt_ids`, `img_ids`) is as the
            pipeline passes it.
        null_conditioning (`Mapping[str, Any]`, *optional*): the same for the unconditional branch, if the pipeline
            runs classifier-free guidance.
        rollout (`tuple[torch.Tensor, torch.Tensor]`, *optional*): true states of the teacher's trajectories, one
            random step per row: x_t float32 [B, ...] and the timestep [B] as the denoiser receives it.
    """

    sample: torch.Tensor
    conditioning: Mapping[str, Any]
    null_conditioning: Mapping[str, Any] | None = None
    rollout: tuple[torch.Tensor, torch.Tensor] | None = None
