# SPDX-License-Identifier: Apache-2.0
"""Predicted seconds: operations by hand, and units that people use."""

import pytest
import torch
from torch import nn

from diffusers_ternary.planning import Part
from diffusers_ternary.planning.durations import Durations, product_rate, row_operations, spoken
from diffusers_ternary.planning.picture import Picture


def part() -> Part:
    return Part.of_model("transformer", nn.Sequential(nn.Linear(10, 30, bias=False), nn.Linear(30, 10, bias=False)))


def test_two_operations_for_each_weight_and_token():
    picture = Picture(1024, text_tokens=12)
    denoiser = part()
    tokens = (1024 // 8) ** 2 + 12
    assert picture.tokens(denoiser, [denoiser]) == tokens
    assert row_operations(denoiser, [denoiser], picture) == 2 * 600 * tokens


def test_a_run_is_so_many_forwards():
    denoiser, rate = part(), 1e6
    durations = Durations(denoiser, [denoiser], Picture(64, text_tokens=36), calls=20, rate=rate)
    forward = 2 * 600 * 100 / rate + 3e-5 * 3
    assert durations.drawing(4) == pytest.approx(80 * forward)
    assert durations.gathering(4, passes=3) == pytest.approx(4 * 3 * 80 * forward)
    assert durations.training(7, 2) == pytest.approx(5 * 14 * forward)


def test_the_rate_of_this_machine_is_one_that_machines_have():
    assert 1e7 < product_rate(torch.device("cpu"), torch.float32) < 1e16


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.04 s"), (45.2, "45 s"), (725, "12 min"), (12300, "3.4 h"), (500000, "5.8 days")]
)
def test_spoken(seconds, text):
    assert spoken(seconds) == text
