# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation: how far the packed student is from the teacher on prompts that nothing was trained on."""

import torch
from torch import nn

from ..rollouts import float_dtype, normalized_error
from .inputs import TeacherData, held_out_inputs
from .loss import DenoiserInputs
from .noise import NoiseProcess


_DRAWS = 4  # states per prompt


class HeldOutError:
    """mean |v_s - v_t|^2 / mean |v_t|^2 of a student on fixed states of the teacher's trajectories.

    Args:
        data ([`TeacherData`]): of the held-out prompts.
        noise ([`NoiseProcess`]): for data without trajectories.
        teacher (`nn.Module`): asked once for each state.
        batch_size (`int`): rows of a forward.
        device (`torch.device`): where both denoisers are.
    """

    def __init__(
        self, data: TeacherData, noise: NoiseProcess, teacher: nn.Module, *, batch_size: int, device: torch.device
    ) -> None:
        self._device, self._dtype = device, float_dtype(teacher)
        self._cases: list[tuple[DenoiserInputs, torch.Tensor]] = []
        for draw in range(_DRAWS):
            for start in range(0, len(data), batch_size):
                rows = range(start, min(start + batch_size, len(data)))
                inputs = held_out_inputs(data, noise, rows, draw=draw)
                self._cases.append((inputs, self._predict(teacher, inputs)))

    def of(self, student: nn.Module) -> float:
        """The error of a student; NaN if it predicts NaN."""
        return normalized_error((self._predict(student, inputs), expected) for inputs, expected in self._cases)

    @torch.no_grad()
    def _predict(self, denoiser: nn.Module, inputs: DenoiserInputs) -> torch.Tensor:
        return inputs.to(self._device, self._dtype).call(denoiser).float().cpu()
