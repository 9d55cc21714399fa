# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmarks run from end to end without a GPU: tiny shapes, every path, files written."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from integration_tests.support.interpreter import skip_without_interpreter


skip_without_interpreter()
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


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
    assert [row for row in rows if row["quantity"] == "error"] == []
    steps = {(row["weights"], row["mode"]) for row in rows if row["quantity"] == "step"}
    assert steps >= {(weights, mode) for weights in ("bf16", "ternary") for mode in ("eager", "compiled")}
    assert ("ternary", "eager, fused qkv") in steps
    assert {row["quantity"] for row in rows} >= {"difference", "weights", "peak of a step", "host", "size", "load"}
    assert all(row["device"] and "torch" in row["versions"] for row in rows)
    assert text.splitlines()[-1].startswith("Written to")


def test_one_command_survives_its_stages(tmp_path, monkeypatch):
    """A stage that fails or takes too long costs nothing that comes after; what it printed is kept."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all

    scripts = {
        "fails": "print('first words', flush=True); raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
        "good": "import sys; open(sys.argv[-1] + '/good.csv', 'w').close()",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    stages = [run_all.Stage(name, f"{name}.py", (), 2 if name == "slow" else 30) for name in scripts]
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "STAGES", stages)
    monkeypatch.setattr(run_all, "LEAST_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--output", str(tmp_path / "results")])
    assert run_all.main() == 0
    log = (tmp_path / "results" / "run.log").read_text(encoding="utf-8")
    assert "first words" in log
    for line in ("=== fails exit 3", "=== slow stopped at its limit", "=== good exit 0", "=== end after"):
        assert line in log
    assert (tmp_path / "results" / "good.csv").exists()


def test_the_stages_are_scripts_that_fit_the_time(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all

    assert all((FOLDER / stage.script).is_file() for stage in run_all.STAGES)
    assert sum(stage.seconds for stage in run_all.STAGES) <= 480
