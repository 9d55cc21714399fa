# SPDX-License-Identifier: Apache-2.0
"""The table of quality.py: what it keeps, what it sums up, and what it refuses; and its rows on a tiny teacher."""

import csv
import dataclasses
import importlib
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.support.scenes import tiny_teacher


FOLDER = Path(__file__).parent


@pytest.fixture
def quality_table(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("quality_table")


@pytest.fixture
def row(quality_table):
    return quality_table.Row(
        row="twn",
        seed="0",
        bits_per_weight=1.7,
        overall=0.5,
        single_object=0.9,
        two_object=0.6,
        counting=0.2,
        colors=0.8,
        position=0.3,
        color_attr=0.2,
        teacher_overall=0.8,
        relative=0.625,
        psnr_mean_db=20.0,
        psnr_pooled_db=19.0,
        velocity_nmse=0.1,
        pictures=12,
        how="16 prompts",
        convert_seconds=1.0,
        draw_seconds=0.1,
        machine="here",
    )


def test_finished_rows_are_found_again_and_summed_up(quality_table, row, tmp_path):
    path = tmp_path / "results" / "table.csv"
    table = quality_table.Table(path, ["absmean", "twn"], "one teacher")
    overall = (0.5, 0.56, 0.44)
    for seed, value in enumerate(overall):
        table.add(dataclasses.replace(row, seed=str(seed), overall=value))
    table.add(dataclasses.replace(row, row="absmean", psnr_mean_db=math.nan))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# one teacher"
    read = list(csv.DictReader(lines[1:]))
    names = [(line["row"], line["seed"]) for line in read]
    assert names == [("absmean", "0"), ("absmean", "mean"), *(("twn", s) for s in ("0", "1", "2", "mean", "sd"))]
    assert float(read[-2]["overall"]) == pytest.approx(statistics.fmean(overall))
    assert float(read[-1]["overall"]) == pytest.approx(0.06)
    assert float(read[-1]["bits_per_weight"]) == 0
    again = quality_table.Table(path, ["absmean", "twn"], "one teacher")
    assert again.has("twn", 2, "16 prompts")
    assert not again.has("twn", 3, "16 prompts")
    assert not again.has("twn", 2, "32 prompts")  # made otherwise: measured anew


def test_rows_of_another_teacher_are_not_mixed_in(quality_table, row, tmp_path):
    path = tmp_path / "table.csv"
    quality_table.Table(path, [], "one teacher").add(row)
    with pytest.raises(ValueError, match=r"one teacher\ninstead of\n.*another teacher\nChoose another --output"):
        quality_table.Table(path, [], "another teacher")


def test_a_picture_without_difference_has_a_finite_psnr(quality_table):
    assert quality_table.mean_psnr([20.0, math.inf]) == 40.0


@pytest.mark.slow
def test_a_teacher_is_measured_row_by_row_and_a_rerun_measures_nothing(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    command = [sys.executable, str(FOLDER / "quality.py"), "--teacher", str(tmp_path / "teacher"), "--seeds", "0"]
    command += ["--count", "6", "--calibration-prompts", "4", "--output", str(tmp_path / "scenes.csv")]
    command += ["--work", str(tmp_path / "work"), "--rows", "twn", "calibrated", "calibrated, packed"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    with (tmp_path / "scenes.csv").open(encoding="utf-8") as file:
        assert "6 held-out prompts a seed" in file.readline()
        rows = {line["row"]: line for line in csv.DictReader(file) if line["seed"] == "0"}
    assert list(rows) == ["teacher, bfloat16", "twn", "calibrated", "calibrated, packed"]
    error = {name: float(line["velocity_nmse"]) for name, line in rows.items()}
    assert error["teacher, bfloat16"] == 0 < error["calibrated"] < error["twn"]
    # Dequantized weights in bfloat16 stand for the packed layers.
    assert error["calibrated, packed"] == pytest.approx(error["calibrated"], rel=0.05)
    assert rows["calibrated"]["bits_per_weight"] == rows["twn"]["bits_per_weight"]
    assert (tmp_path / "scenes_seed0.png").is_file()
    assert (tmp_path / "scenes.png").is_file()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
