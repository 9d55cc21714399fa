# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary demo --scenes`: the embedded ternary model draws a user's prompt, and the judge scores it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.cli.console import ExitCode
from diffusers_ternary.demo import scenes
from diffusers_ternary.demo.scenes import FIGURES, FOLDER, SHOWN_PROMPTS, draw_scenes, scenes_demo_pipeline
from diffusers_ternary.evaluation.geneval import TASKS
from diffusers_ternary.evaluation.scenes.files import JUDGE, scenes_file
from diffusers_ternary.evaluation.scenes.prompts import read_task
from integration_tests.support.command_line import run_command
from integration_tests.support.scenes import examples, tiny_teacher


embed_ternary = examples("embed_ternary")
TABLE = """# Scenes
row,seed,bits_per_weight,overall,single_object,two_object,counting,colors,position,color_attr,psnr_mean_db,pictures
"teacher, bfloat16",0,16.0,0.9,1.0,0.9,0.8,1.0,0.8,0.9,nan,12
"teacher, bfloat16",mean,16.0,0.9,1.0,0.9,0.8,1.0,0.8,0.9,nan,12
calibrated,0,1.7,0.8,1.0,0.8,0.6,1.0,0.7,0.7,20.0,12
calibrated,1,1.7,0.6,1.0,0.8,0.6,1.0,0.7,0.7,22.0,12
calibrated,mean,1.7,0.7,1.0,0.8,0.6,1.0,0.7,0.7,21.0,12
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An embedded model of the size of a test, written as the real one is."""
    base = tmp_path_factory.mktemp("embedded")
    (base / "scenes.csv").write_text(TABLE, encoding="utf-8")
    pipeline = tiny_teacher().to(torch.bfloat16)
    quantize(pipeline, TernaryConfig(activation_dtype="none"))
    figures = embed_ternary.figures_of(base / "scenes.csv", "calibrated")
    embed_ternary.write(pipeline, scenes_file(JUDGE), figures, base / "model")
    return base / "model"


def test_the_model_is_packed_and_carries_the_tables_figures(folder):
    pipeline = scenes_demo_pipeline(folder=folder)
    assert packed_layers(pipeline.transformer)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} <= {torch.bfloat16, torch.float16, torch.uint8, torch.int8}
    assert not [path for path in folder.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]
    figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    assert (figures["seeds"], figures["pictures"], figures["bits_per_weight"]) == (2, 12, 1.7)
    assert figures["ternary"]["overall"] == 0.7
    assert figures["teacher"]["counting"] == 0.8


def test_a_row_that_the_table_lacks_is_named(tmp_path):
    (tmp_path / "scenes.csv").write_text(TABLE, encoding="utf-8")
    with pytest.raises(ValueError, match="no row 'distilled full'; it has teacher, bfloat16, calibrated"):
        embed_ternary.figures_of(tmp_path / "scenes.csv", "distilled full")


def test_prompts_outside_the_grammar_are_drawn_but_not_scored(folder, caplog):
    drawing = draw_scenes(["a red cat left of two blue keys", "a dragon"], pictures=2, seed=5, folder=folder)
    assert drawing.seeds == (5, 6, 5, 6)
    assert [image.size for image in drawing.images] == [(64, 64)] * 4
    assert [judgement is None for judgement in drawing.judgements] == [False, False, True, True]
    assert drawing.unread == ("a dragon",)
    assert "outside the grammar" in caplog.text


def test_the_shown_prompts_are_of_the_grammar():
    tags = [task.tag for task in map(read_task, SHOWN_PROMPTS)]
    assert set(TASKS) <= set(tags)


def test_the_command_draws_a_users_prompt(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "FOLDER", folder)
    arguments = ["--scenes", "a red cat", "--pictures", "2", "--output", tmp_path / "out"]
    run = run_command("demo", *arguments, "--json", tmp_path / "pictures.json")
    assert run.exit_code == ExitCode.OK, run.output
    assert "70.0%" in run.output  # overall, ternary
    assert "90.0%" in run.output  # overall, teacher
    with Image.open(tmp_path / "out" / "scenes.png") as sheet:
        assert sheet.format == "PNG"
    written = json.loads((tmp_path / "pictures.json").read_text(encoding="utf-8"))
    assert [(picture["prompt"], picture["seed"]) for picture in written] == [("a red cat", 0), ("a red cat", 1)]
    assert (
        run_command("demo", *arguments, "--json", tmp_path / "pictures.json").exit_code == ExitCode.OK
    )  # over its own


def test_a_build_without_the_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "FOLDER", tmp_path / "none")
    run = run_command("demo", "--scenes", "--output", tmp_path / "out")
    assert run.exit_code == ExitCode.BAD_INPUT
    assert "embed_ternary.py" in run.output
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("arguments", [["a red cat"], ["--scenes", "--full"]])
def test_options_of_the_other_model_are_refused(arguments):
    assert run_command("demo", *arguments).exit_code == ExitCode.USAGE


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="this build does not carry the ternary Scenes model yet")
def test_the_embedded_model_draws_what_it_is_asked():
    drawing = draw_scenes(pictures=2)
    right = [judgement.score for judgement in drawing.judgements if judgement is not None]
    assert len(right) == 2 * len(SHOWN_PROMPTS)
    assert sum(right) / len(right) > 0.5
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 9_000_000
