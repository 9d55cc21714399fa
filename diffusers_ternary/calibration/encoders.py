# SPDX-License-Identifier: Apache-2.0
"""Text encoders: pipeline calls that end where the denoiser is first called, and what it was to be given."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..backend.components import encodes_text
from ..backend.config import DENOISER_COMPONENTS
from ..rollouts import RolloutBatch, Rollouts, map_tensors, normalized_error


class _Reached(Exception):  # noqa: N818 - no error: the rest of the call is not needed
    pass


@dataclasses.dataclass(frozen=True)
class EncoderRollouts(Rollouts):
    """Trajectories of a pipeline without their denoising: text encoders are called, and nothing after them.

    Args:
        prompts, seeds, call_kwargs, batch_size: see [`Rollouts`].
    """

    def draw(self, pipeline: DiffusionPipeline, batch: RolloutBatch) -> list[torch.Tensor]:
        """One pipeline call, inside [`prepared`], up to the first call of a denoiser.

        Returns:
            `list[torch.Tensor]`: what the denoiser was to be given, on the CPU, in a fixed order: noise, timestep,
            embeddings, ...
        """
        inputs: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            inputs.append(tensor.detach().cpu())
            return tensor

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            map_tensors((args, kwargs), keep)
            raise _Reached

        with contextlib.ExitStack() as stack:
            for name, part in pipeline.components.items():
                if DENOISER_COMPONENTS.fullmatch(name) and isinstance(part, nn.Module):
                    stack.callback(part.register_forward_pre_hook(stop, with_kwargs=True).remove)
            with contextlib.suppress(_Reached):
                super().draw(pipeline, batch)
        pipeline.maybe_free_model_hooks()  # as the call does at its end
        return inputs


def rollouts_for(component: str, rollouts: Rollouts) -> Rollouts:
    """What shows a component's inputs: whole trajectories, or for text encoders only their beginning."""
    if not encodes_text(component):
        return rollouts
    return EncoderRollouts(**{field.name: getattr(rollouts, field.name) for field in dataclasses.fields(rollouts)})


@dataclasses.dataclass(frozen=True)
class EncoderStates:
    """What the denoiser is given while all encoders are float.

    Args:
        name (`str`): see [`TeacherStates`].
        pipeline (`DiffusionPipeline`): with the encoder that is measured.
        rollouts ([`EncoderRollouts`]): prompts that no statistics were taken from, or their beginning.
        expected (`tuple[tuple[torch.Tensor, ...], ...]`): the denoiser's inputs, batch by batch.
    """

    measured: ClassVar[str] = "what the denoiser is given"

    name: str
    pipeline: DiffusionPipeline
    rollouts: EncoderRollouts
    expected: tuple[tuple[torch.Tensor, ...], ...]

    @classmethod
    def record(cls, name: str, pipeline: DiffusionPipeline, rollouts: EncoderRollouts) -> "EncoderStates":
        """The states of the pipeline as it is now, inside [`prepared`].

        Raises:
            ValueError: if an input of the denoiser is not finite.
        """
        expected = tuple(tuple(rollouts.draw(pipeline, batch)) for batch in rollouts.batches())
        for tensor in (tensor for inputs in expected for tensor in inputs):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{type(pipeline).__name__}: the denoiser is given NaN or Inf. Load the text encoders in bfloat16 "
                    "or float32 instead of float16."
                )
        return cls(name, pipeline, rollouts, expected)

    def error(self, _encoder: nn.Module) -> float:
        """mean |e - e_float|² / mean |e_float|² of the embeddings that the denoiser gets from the pipeline as it is
        now; of several (pooled and per token), of the worst. What does not come of the encoder does not change."""
        batches = list(self.rollouts.batches())
        now = [self.rollouts.draw(self.pipeline, batch) for batch in batches]
        errors = [normalized_error(pairs) for pairs in self._pairs(now)]
        return float(torch.tensor(errors).max())  # NaN if one of them is

    def _pairs(self, now: list[list[torch.Tensor]]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Each input of the denoiser, now and before, over all batches."""
        for index, first in enumerate(self.expected[0]):
            if first.is_floating_point():
                yield [(own[index], other[index]) for own, other in zip(now, self.expected, strict=True)]
