# SPDX-License-Identifier: Apache-2.0
"""What is printed before a command runs: the call that a model was made for, and dry runs that write nothing."""

import json
import re

import pytest

from diffusers_ternary.cli.call import known_call
from diffusers_ternary.demo import DEMO_CALL, demo_folder
from integration_tests.support.command_line import run_command


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a smiling person with red hair\na person\n")
    return path


def test_models_carry_their_call(tmp_path):
    assert known_call(demo_folder()) == dict(DEMO_CALL)
    assert known_call(str(tmp_path)) == {}
    call = {"height": 64, "num_inference_steps": 4, "negative_prompt_embeds": "<object at 0x1>"}
    (tmp_path / "calibration.json").write_text(json.dumps({"calibration": {"call_kwargs": call}}))
    assert known_call(str(tmp_path)) == {"height": 64, "num_inference_steps": 4}
    (tmp_path / "distill.json").write_text(json.dumps({"distill_config": {"call_kwargs": {"height": 32}}}))
    assert known_call(str(tmp_path)) == {"height": 32}


@pytest.mark.parametrize("section", [[1], {"call_kwargs": [1]}, None])
def test_a_report_of_something_else_says_nothing_of_the_call(section, tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps({"calibration": section}))
    assert known_call(str(tmp_path)) == {}


@pytest.mark.parametrize("source", ["demo", demo_folder()])
@pytest.mark.parametrize("command", ["calibrate", "distill"])
def test_a_dry_run_says_what_would_be_drawn_and_writes_nothing(command, source, prompts, tmp_path):
    result = run_command(command, source, tmp_path / "out", "--prompts", prompts, "--guidance", "2", "--dry-run")
    assert result.exit_code == 0, result.output
    line = "FluxPipeline: 2 prompts, 16 x 16 pixels, 8 denoising steps, guidance_scale 2.0, true_cfg_scale 1.0"
    assert line in result.output
    assert ("2000 updates of 32 rows" in result.output) == (command == "distill")
    assert (re.search(r"of the time \S+ (s|min|h) to solve \d\d layers", result.output) is not None) == (
        command == "calibrate"
    )
    note = "once the student is there" if command == "distill" else "of the time"
    assert re.search(rf"predicted: about [\d.]+ (s|min|h) on cpu, [\d.]+ [MG]B \({note}", result.output)
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_dry_run_of_quantize(tmp_path):
    result = run_command("quantize", "demo", tmp_path / "out", "--hadamard", "64", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "hadamard=64" in result.output
    assert "transformer: 6.8 MB, to quantize" in result.output
    assert "vae:" in result.output
    assert list(tmp_path.iterdir()) == []
    wrong = run_command("quantize", "demo", tmp_path / "out", "--component", "unet", "--dry-run")
    assert (wrong.exit_code, "has no component unet" in wrong.output) == (3, True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert run_command("quantize", "demo", tmp_path / "out", "--dry-run").exit_code == 3


def test_old_flags_of_distill_are_read_and_warn(prompts, tmp_path):
    old = ["--inference-steps", "3", "--held-out", prompts, "--cache", tmp_path / "cache", "--accumulate", "2"]
    result = run_command("distill", "demo", tmp_path / "out", "--prompts", prompts, *old, "--dry-run")
    assert result.exit_code == 0, result.output
    for name, new in (("--inference-steps", "--steps"), ("--held-out FILE", "--held-out-prompts FILE")):
        assert f"{name} is {new} now" in result.output
    assert "--cache is --cache-dir now" in result.output
    assert "3 denoising steps" in result.output


def test_a_negative_number_of_held_out_prompts_is_not_a_file(prompts, tmp_path):
    result = run_command("distill", "demo", tmp_path / "out", "--prompts", prompts, "--held-out", "-1")
    assert result.exit_code == 2, result.output
    assert "held_out=-1 is below 1" in result.output


def test_steps_of_distill_are_denoising_steps(prompts, tmp_path):
    result = run_command("distill", "demo", tmp_path / "out", "--prompts", prompts, "--steps", "3", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "note: --steps are denoising steps" in result.output
    assert "3 denoising steps" in result.output
    assert "2000 updates" in result.output
