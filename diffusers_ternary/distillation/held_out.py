# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation: how far the packed student is from the teacher on prompts that nothing was trained on."""

import torch
from torch import nn

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
        listed (`bool`, *optional*, defaults to `False`): see [`DenoiserInputs`].
    """

    def __init__(
        self,
        data: TeacherData,
        noise: NoiseProcess,
        teacher: nn.Module,
        *,
        batch_size: int,
        device: torch.device,
        listed: bool = False,
    ) -> None:
        self._device = device
        self._cases: list[tuple[DenoiserInputs, torch.Tensor]] = []
        dtype = float_dtype(teacher)
        with torch.no_grad():
            for draw in range(_DRAWS):
                for start in range(0, len(data), batch_size):
                    rows = range(start, min(start + batch_size, len(data)))
                    inputs = held_out_inputs(data, noise, rows, draw=draw, listed=listed)
                    self._cases.append((inputs, inputs.to(device, dtype).call(teacher).float().cpu()))

    @torch.no_grad()
    def of(self, student: nn.Module) -> float:
        """The error of a student; NaN if it predicts NaN."""
        dtype = float_dtype(student)
        error = norm = 0.0
        for inputs, expected in self._cases:
            predicted = inputs.to(self._device, dtype).call(student).float().cpu()
            error += float((predicted - expected).double().square().sum())
            norm += float(expected.double().square().sum())
        return error / norm if norm else float("nan")


def float_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's first floating parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
