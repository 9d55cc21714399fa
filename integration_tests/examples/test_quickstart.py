# SPDX-License-Identifier: Apache-2.0
"""The notebook, cell by cell, without Jupyter: it runs offline, shows pictures, and says what is true."""

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run_cell(source: str, scope: dict[str, Any]) -> Any:
    """Runs a cell and returns the value of its last line, which a notebook shows."""
    tree = ast.parse(source)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), scope)
    return None if shown is None else eval(compile(ast.Expression(shown.value), NOTEBOOK.name, "eval"), scope)


def test_outputs_are_stripped(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.slow
def test_it_runs_and_shows_pictures(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scope: dict[str, Any] = {}
    shown = [run_cell("".join(cell["source"]), scope) for cell in cells if cell["cell_type"] == "code"]
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert [picture.size for picture in pictures] == [(640, 80)] * 4, "teacher, rounded, calibrated, loaded"
    assert scope["scores"]["calibrated"] > scope["scores"]["rounded"] + 3
    assert pictures[2].tobytes() == pictures[3].tobytes()
    assert shown[-1]["transformer"][0] == "ternary"
