# SPDX-License-Identifier: Apache-2.0
"""Protected ends: the order of the blocks, and a stock pipeline. Measured budgets are in `test_sensitivity.py`."""

import pytest

from diffusers_ternary import TernaryConfig, calibrate
from diffusers_ternary.backend import file_bytes, packed_layers, plan_pipeline
from diffusers_ternary.calibration import CalibrationConfig, SolverConfig
from diffusers_ternary.calibration.allocation import outermost_first
from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Linear
from integration_tests.support.pipelines import PIPELINES


def test_the_ends_come_first():
    order = [(run, name) for run, name in outermost_first([("a", [["1", "2"], ["3"], ["4"], ["5"]]), ("b", [["6"]])])]
    assert order == [("a", "1"), ("a", "2"), ("a", "5"), ("b", "6"), ("a", "3"), ("a", "4")]


def test_the_blocks_at_the_ends_are_widened_as_far_as_the_budget_reaches():
    tiny, base = PIPELINES["flux"], TernaryConfig(group_size=16)
    pipeline = tiny.build()
    pipeline.transformer.eval()
    matrices = {
        name: pipeline.transformer.get_parameter(f"{name}.weight").shape
        for name in plan_pipeline(pipeline, base)["transformer"].kinds
    }
    first = {name for name in matrices if name.startswith("transformer_blocks.0.")}  # a single block follows it
    assert 0 < len(first) < len(matrices)
    stored = sum(
        file_bytes(Int8Spec(*shape) if name in first else TernarySpec.for_matrix(*shape, group_size=16))
        for name, shape in matrices.items()
    )
    bits = 8 * stored / sum(rows * columns for rows, columns in matrices.values())
    config = CalibrationConfig(
        call_kwargs={**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 1},
        solver=SolverConfig(descent_passes=0),
        size_budget=f"{bits + 1e-6:.6f} bits",
        allocation="protected_ends",
    )
    report = calibrate(pipeline, ["a red cat"], base, config).ternary_report

    layers = packed_layers(pipeline.transformer)
    assert {name for name, layer in layers.items() if isinstance(layer, Int8Linear)} == first
    assert layers.keys() == matrices.keys()
    assert report.bits_per_weight == pytest.approx(bits, abs=1e-5)
    assert not report.sensitivity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_budget": "2 bits", "allocation": "ends"}, "'ends' is not one of least_error, protected_ends"),
        ({"allocation": "protected_ends"}, "spends a size_budget, and there is none"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**options)
