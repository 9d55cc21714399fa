# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmarks run from end to end without a GPU: tiny shapes, every path, files written."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from support.interpreter import skip_without_interpreter


skip_without_interpreter()
FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def dry_run(script: str, output: Path) -> str:
    """Runs a benchmark in a process of its own, in which Triton interprets."""
    result = subprocess.run(
        [sys.executable, str(FOLDER / script), "--dry-run", "--output", str(output)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def rows_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_linear(tmp_path):
    text = dry_run("bench_linear.py", tmp_path)
    rows = rows_of(tmp_path)
    failed = {row["layer"]: row["note"] for row in rows if row["note"].startswith(("wrong", "Assertion"))}
    assert failed == {}
    layers = {row["layer"] for row in rows}
    for path in ("gemv", "fused", "dense", "library", "rotated", "_int_mm"):
        assert any(path in layer for layer in layers), path
    assert all(row["device"] and "torch" in row["versions"] for row in rows)
    assert text.splitlines()[-1].startswith("Written to")
    assert "goal 1.40x" in text
    assert list(tmp_path.glob("*.png"))


def test_model(tmp_path):
    text = dry_run("bench_model.py", tmp_path)
    rows = rows_of(tmp_path)
    assert {(row["weights"], row["mode"]) for row in rows} == {
        (weights, mode) for weights in ("bf16", "ternary") for mode in ("eager", "compiled")
    }
    assert text.splitlines()[-1].startswith("Written to")
