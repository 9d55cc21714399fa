# SPDX-License-Identifier: Apache-2.0
"""The distillation loss, and the two networks it compares."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rollouts import map_tensors, timestep_name
from .blocks import recorded_blocks


@dataclasses.dataclass(frozen=True)
class DenoiserInputs:
    """One forward of the denoiser.

    Args:
        sample (`torch.Tensor`): float32 `[B, ...]`, x_t.
        timestep (`torch.Tensor`): float32 `[B]`, as the denoiser receives it.
        conditioning (`Mapping[str, Any]`): its other keyword arguments.
        listed (`bool`): whether it takes the sample as a list with a tensor per row.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    conditioning: Mapping[str, Any]
    listed: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> "DenoiserInputs":
        """Moved to a device, what is floating in `dtype`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        conditioning = {name: map_tensors(value, move) for name, value in self.conditioning.items()}
        return DenoiserInputs(move(self.sample), move(self.timestep), conditioning, self.listed)

    def call(self, denoiser: nn.Module) -> torch.Tensor:
        """The prediction, in the shape of the sample: a learned variance beside it is left out."""
        arguments = {**self.conditioning, timestep_name(denoiser): self.timestep, "return_dict": False}
        prediction = denoiser(list(self.sample) if self.listed else self.sample, **arguments)[0]
        if isinstance(prediction, list):
            prediction = torch.stack(prediction)
        if prediction.dim() > 1 and prediction.shape[1] == 2 * self.sample.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]
        return prediction


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a denoiser makes of inputs: what the student is to make of the teacher's.

    Args:
        prediction (`torch.Tensor`, *optional*): `None` if only blocks were asked for.
        blocks (`Mapping[str, tuple[torch.Tensor, ...]]`): block → outputs.
    """

    prediction: torch.Tensor | None
    blocks: Mapping[str, tuple[torch.Tensor, ...]]


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """mean |s - t|^2 / mean |t|^2, in float32."""
    expected = teacher.float()
    norm = expected.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (student.float() - expected).square().mean() / norm


def block_error(
    student: Mapping[str, tuple[torch.Tensor, ...]], teacher: Mapping[str, tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    """Mean of [`relative_error`] over the blocks; a block of several outputs counts with their mean."""
    blocks = []
    for name, expected in teacher.items():
        pairs = zip(student[name], expected, strict=True)
        blocks.append(torch.stack([relative_error(own, other) for own, other in pairs]).mean())
    return torch.stack(blocks).mean()


def observe(
    denoiser: nn.Module, inputs: DenoiserInputs, blocks: Sequence[str], *, stop_after: str | None = None
) -> Targets:
    """One forward: the prediction, and the outputs of blocks.

    Args:
        denoiser (`nn.Module`): the teacher or the trainee.
        inputs ([`DenoiserInputs`]): of the forward.
        blocks (`Sequence[str]`): blocks whose outputs are wanted.
        stop_after (`str`, *optional*): the forward ends after this block, without a prediction.
    """
    prediction = None
    with recorded_blocks(denoiser, blocks, stop_after=stop_after) as outputs:
        prediction = inputs.call(denoiser)
    return Targets(prediction, outputs)


class StudentNetwork(nn.Module):
    """The trainee with its loss, one module for DDP and FSDP to wrap.

    The loss is the relative error of the prediction plus `block_weight` times the mean relative error of the blocks;
    if the forward stops after a block, the error of that block alone.

    Args:
        denoiser (`nn.Module`): from [`make_trainee`].
        blocks (`Sequence[str]`): blocks that are compared.
        block_weight (`float`): see [`DistillConfig`].
        stop_after (`str`, *optional*): the forward ends after this block.
    """

    def __init__(
        self, denoiser: nn.Module, blocks: Sequence[str], *, block_weight: float, stop_after: str | None = None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.blocks = blocks
        self.block_weight = block_weight
        self.stop_after = stop_after

    def forward(self, inputs: DenoiserInputs, targets: Targets) -> torch.Tensor:
        """Scalar loss, float32."""
        own = observe(self.denoiser, inputs, self.blocks, stop_after=self.stop_after)
        if own.prediction is None or targets.prediction is None:
            return block_error(own.blocks, targets.blocks)
        loss = relative_error(own.prediction, targets.prediction)
        if self.block_weight and targets.blocks:
            loss = loss + self.block_weight * block_error(own.blocks, targets.blocks)
        return loss
