# SPDX-License-Identifier: Apache-2.0
"""The prediction of the solver's time, and the time left on its bar."""

import pytest
import torch

from diffusers_ternary import TernaryConfig
from diffusers_ternary.calibration import CalibrationConfig, SolverConfig, solve_time
from diffusers_ternary.calibration.solve_time import WorkBar, layer_work, predicted_seconds


QUICK = CalibrationConfig(solver=SolverConfig(descent_passes=0, starts=1))


def test_the_time_of_one_small_layer_stands_for_all(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(solve_time.time, "perf_counter", lambda: next(clock, 102.0))
    shapes = [(16, 32), (24, 32), (8, 16)]  # the one that is timed has 24 rows of 32
    predicted = predicted_seconds(shapes, TernaryConfig(group_size=16), QUICK, torch.device("cpu"))
    assert predicted == pytest.approx(2.0 * sum(layer_work(*shape) for shape in shapes) / layer_work(24, 32))
    assert predicted_seconds([], TernaryConfig(), QUICK, torch.device("cpu")) == 0


def test_time_left_counts_work(capsys):
    with WorkBar("Solving", [1e6, 3e6]) as bar:
        bar.start_t -= 10
        bar.finish(1e6)
        state = bar.format_dict
        assert (state["n"], state["total"]) == (1e6, 4e6)
        assert "25%" in str(bar)
        assert "1 of 2 layers [00:10<00:3" in str(bar)
        bar.finish(3e6)
        assert "100%" in str(bar)
