# SPDX-License-Identifier: Apache-2.0
"""The commands as people call them: output, files and exit codes."""

import json
import shutil

import pytest
from diffusers import DiffusionPipeline

import diffusers_ternary
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from integration_tests.support.command_line import run_command


def test_quantize_then_inspect_then_load(source, tmp_path):
    result = run_command(
        "quantize", source, tmp_path / "out", "--override", "*.norm1.linear=int8", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    assert "bits per converted weight" in result.output

    described = run_command("inspect", tmp_path / "out", "--json")
    assert described.exit_code == 0
    components = {part["name"]: part for part in json.loads(described.output)}
    assert components["transformer"]["format_version"] == 2
    assert components["text_encoder"]["format_version"] is None

    table = run_command("inspect", tmp_path / "out" / "transformer")
    assert "transformer_blocks.*.attn.to_q" in table.output
    assert "int8" in table.output

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, TernaryLinear)
    assert isinstance(pipe.transformer.transformer_blocks[0].norm1.linear, Int8Linear)


def test_the_embedded_model_by_name(tmp_path):
    result = run_command("quantize", "demo", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1.716 bits per converted weight" in result.output
    assert "choose from" in run_command("quantize", "demo:nothing", tmp_path / "other").output


def test_a_single_model_and_a_text_encoder(source, tmp_path):
    assert run_command("quantize", source / "transformer", tmp_path / "t", "--group-size", 0).exit_code == 0
    assert "ternary per row" in run_command("inspect", tmp_path / "t").output
    assert run_command("quantize", source / "text_encoder_2", tmp_path / "e").exit_code == 0
    assert "encoder.block.*.layer.*.DenseReluDense.wo" in run_command("inspect", tmp_path / "e").output


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--rounding", "best"], "rounding='best' is not one of twn", 2),
        (["--override", "int8"], "is not PATTERN=KIND", 2),
        (["--override", "x=int4"], "is not one of ternary, int8, keep", 2),
        (["--dtype", "int8"], "is not one of float32", 2),
        (["--component", "unet"], "no component unet", 3),
        (["--skip", "*"], "no layer to convert", 3),
    ],
)
def test_bad_options_say_what_to_do_and_leave_nothing(source, tmp_path, arguments, message, code):
    result = run_command("quantize", source, tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_not_touched(source, tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = run_command("quantize", source, tmp_path)
    assert result.exit_code == 3
    assert "--overwrite" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_overwriting_never_deletes_the_source_or_the_current_folder(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "models" / "flux")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path / "models")
    cases = {
        ("demo", "."): "is the current folder",
        ("demo", ".."): "holds the current folder",
        ("flux", "flux"): "is the source",
        ("flux", "../models/flux"): "is the source",
        ("flux", "."): "holds the source",
        ("flux", "flux/transformer"): "is part of the source",
    }
    for (place, target), message in cases.items():
        result = run_command("quantize", place, target, "--overwrite")
        assert result.exit_code == 3, (place, target, result.output)
        assert message in result.output
        assert "which no result may replace" in result.output or "part of the source" in result.output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = run_command("quantize", "flux", tmp_path / "mine", "--overwrite")
    assert result.exit_code == 3
    assert "notes.txt, which neither this package nor save_pretrained wrote" in result.output
    (tmp_path / "mine" / "notes.txt").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_usage_errors_and_help():
    assert run_command("quantize").exit_code == 2
    assert run_command("nonsense").exit_code == 2
    assert run_command("inspect", "/no/such/path").exit_code == 3
    for command in ("quantize", "calibrate", "distill", "convert", "inspect", "evaluate", "push", "demo"):
        result = run_command(command, "--help")
        assert result.exit_code == 0
        assert "Example" in result.output, command
    assert diffusers_ternary.__version__ in run_command("--version").output
