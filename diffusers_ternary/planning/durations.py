# SPDX-License-Identifier: Apache-2.0
"""How long the denoiser works: the operations of a row, over what a matrix product of its size reaches on a device."""

import time
from collections.abc import Iterable

import torch

from .parts import Part
from .picture import Picture


TRAINING_FORWARDS = 5  # of a row, a step of training: teacher, student, the student's again, and two for its gradients
# Forwards that calibration's statistics cost: the forward, the backward of activations, and the products of each input
# and of each output's gradient with itself.
_GATHERING = 4
# A UNet's weights lie where the picture is smallest; its tokens are counted where attention begins.
_UNET_SHARE = 1 / 4
_LAUNCH = 3e-5  # seconds a module takes, however little it computes
_SIDE, _SECONDS = 1024, 0.1  # of the product that is timed, and how long it is repeated


def row_operations(denoiser: Part, parts: Iterable[Part], picture: Picture) -> float:
    """Operations of a forward with one row: two a weight and token. Attention itself is not counted."""
    share = _UNET_SHARE if "down_block_types" in getattr(denoiser.model, "config", {}) else 1.0
    return 2 * share * denoiser.weights * picture.tokens(denoiser, parts)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, timed for a tenth of a second."""
    left, right = (torch.ones(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    float(torch.mm(left, right)[0, 0])  # the first one sets the library up; reading a value waits for the device
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _SECONDS:
        float(torch.mm(left, right)[0, 0])
        products += 1
    return 2 * _SIDE**3 * products / elapsed


class Durations:
    """Predicted seconds of a run on a device.

    Args:
        denoiser ([`Part`]): what is called at every step.
        parts (`Iterable[Part]`): of its pipeline.
        picture ([`Picture`]): what is drawn.
        calls (`int`): of the denoiser for a prompt: steps times branches of guidance.
        rate (`float`): operations a second, see [`product_rate`].
    """

    def __init__(
        self, denoiser: Part, parts: Iterable[Part], picture: Picture, *, calls: int, rate: float, batch_size: int = 1
    ) -> None:
        modules = sum(1 for _ in denoiser.model.modules())
        self.forward = row_operations(denoiser, parts, picture) / rate + _LAUNCH * modules / batch_size
        self.calls = calls

    def drawing(self, prompts: int) -> float:
        """To draw prompts."""
        return self.forward * self.calls * prompts

    def gathering(self, prompts: int, *, passes: int = 1) -> float:
        """To gather the statistics of calibration, in so many passes over the prompts."""
        return _GATHERING * passes * self.drawing(prompts)

    def training(self, updates: int, rows: int) -> float:
        """To train for updates of so many rows each; drawing the teacher's latents comes on top."""
        return TRAINING_FORWARDS * self.forward * updates * rows


def spoken(seconds: float) -> str:
    """Two digits and a unit: 45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds / 86400:.2g}'):g} days"
