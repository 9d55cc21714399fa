# SPDX-License-Identifier: Apache-2.0
"""The calibration report as a table and as a figure, with and without sensitivities."""

import dataclasses

import pytest
from rich.console import Console

from diffusers_ternary.calibration import CalibrationReport, LayerReport, LayerSensitivity


def layer(name: str, error: float, **fields) -> LayerReport:
    return LayerReport(
        **{
            "name": name,
            "shape": (8, 16),
            "group_size": 16,
            "scales": "group",
            "bits_per_weight": 2.5,
            "error_rounded": 2 * error,
            "error_gptq": 1.5 * error,
            "error": error,
            "damping": 0.01,
            "tokens": 10,
            "seconds": 0.1,
            "resumed": False,
            **fields,
        }
    )


REPORT = CalibrationReport(
    layers=(layer("a", 0.1), layer("b", 0.3, hadamard=16, rank=2), layer("c", 0.2)),
    bits_per_weight=2.5,
    prompts=4,
    prompts_sha256="",
    weights_sha256="",
    passes=1,
    statistics_bytes=0,
    seconds_statistics=0.0,
    seconds_solver=0.0,
    config={},
    calibration={},
    versions={},
)
MEASURED = dataclasses.replace(
    REPORT,
    sensitivity=(
        LayerSensitivity(
            "b", (8, 16), {"g16": 40, "int8": 144, "keep": 256}, {"g16": 0.2, "int8": 0.0, "keep": 0.0}, "int8"
        ),
        LayerSensitivity("a", (8, 16), {"g16": 40, "g16-r2": 136}, {"g16": 0.1, "g16-r2": 0.05}, "g16"),
    ),
    velocity_nmse={"transformer": 0.125},
)


def text(report: CalibrationReport) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def test_without_sensitivities_the_worst_layer_comes_first():
    lines = [line.split() for line in text(REPORT).splitlines()]
    names = [words[1] for words in lines if len(words) > 1 and words[1] in "abc"]
    assert names == ["b", "c", "a"]
    assert "g16 group rotated 16 r2" in text(REPORT)
    assert "2.500 bits per weight" in text(REPORT)


def test_with_sensitivities_they_rank():
    shown = text(MEASURED)
    assert shown.index(" b ") < shown.index(" a ")
    for part in ("NMSE as g16", "int8", "2.00e-01", "0.00e+00", "9.00", "velocity NMSE of transformer 0.125"):
        assert part in shown


def test_a_long_table_is_cut_and_says_so():
    many = dataclasses.replace(REPORT, layers=tuple(layer(f"layer{i}", 0.1) for i in range(40)))
    assert "25 more layers in the report" in text(many)


@pytest.mark.parametrize("report", [REPORT, MEASURED], ids=["errors", "sensitivity"])
def test_the_figure_is_an_image(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
