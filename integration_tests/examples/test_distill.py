# SPDX-License-Identifier: Apache-2.0
"""The examples for the real models, run on pipelines of the same classes with tiny weights."""

import json
import pathlib
import runpy
import sys

import pytest
from diffusers import DiffusionPipeline

import diffusers_ternary  # noqa: F401 - registers the backend
from diffusers_ternary.backend import packed_layers
from integration_tests.support.pipelines import PIPELINES


EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
OPTIONS = ["--prompts", "template:9", "--held-out", "3", "--updates", "2", "--float32"]
EXTRA = {"sana": ["--batch-size", "2"], "flux": ["--rows", "2", "--rank", "2"]}


def run_example(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"distill_{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"distill_{name}.py"), run_name="__main__")


@pytest.fixture
def arguments(request, tmp_path) -> list[str]:
    name = request.param
    tiny = PIPELINES[name]
    tiny.build().save_pretrained(tmp_path / "float")
    call = {**tiny.call, "num_inference_steps": 2}
    paths = ["--model", str(tmp_path / "float"), "--output", str(tmp_path / "ternary")]
    return [*paths, "--size", str(tiny.size), "--call", json.dumps(call), *OPTIONS, *EXTRA[name]]


@pytest.mark.parametrize(("arguments", "name"), [("sana", "sana"), ("flux", "flux")], indirect=["arguments"])
def test_example(arguments, name, tmp_path, monkeypatch):
    run_example(name, monkeypatch, *arguments)
    student = DiffusionPipeline.from_pretrained(tmp_path / "ternary")
    assert packed_layers(student.transformer)
    report = json.loads((tmp_path / "ternary-run" / "distill.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2
    assert report["distill_config"]["mode"] == {"sana": "full", "flux": "lora"}[name]
    run_example(name, monkeypatch, *arguments)  # ended already: nothing is trained again


@pytest.mark.parametrize("arguments", ["sana"], indirect=True)
def test_dry_run(arguments, tmp_path, monkeypatch, capsys):
    run_example("sana", monkeypatch, *arguments, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"mode='{m}'" for m in ("scales", "blockwise", "full", "lora")]
    assert not (tmp_path / "ternary-run").exists()


def test_examples_are_short():
    for name in EXTRA:
        assert len((EXAMPLES / f"distill_{name}.py").read_text(encoding="utf-8").splitlines()) <= 80
