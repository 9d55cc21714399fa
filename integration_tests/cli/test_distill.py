# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary distill`: a folder in, a packed folder and a report out, and messages for bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import typer

from diffusers_ternary.cli.app import app
from diffusers_ternary.cli.console import ExitCode
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.rollouts import prompts_sha256
from diffusers_ternary.rollouts.prompts import read_prompts, split_held_out
from integration_tests.support.command_line import run_command


CALL = ["--steps", "2", "--height", "16", "--width", "16", "--set", "max_sequence_length=16"]
SMALL = [*CALL, "--updates", "2", "--batch-size", "2", "--rounded", "--dtype", "float32", "--cpu"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\na blue dog\na house\n", encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "two trees"}\n', encoding="utf-8")
    return path


def run(*arguments: object):
    return run_command("distill", *arguments, *SMALL)


def test_writes_a_packed_pipeline_and_a_report(source, prompts, tmp_path):
    target, kept = tmp_path / "out", tmp_path / "kept"
    held_out = prompts.with_name("held_out.jsonl")
    result = run(
        source, target, "--prompts", prompts, "--held-out-prompts", held_out, "--seed", 3, "--cache-dir", kept
    )
    assert result.exit_code == ExitCode.OK, result.output
    assert "bits per converted weight" in result.output
    assert "held-out velocity error" in result.output
    assert [part.format_version for part in inspect_path(target) if part.name == "transformer"] == [2]
    report = json.loads((target / "distill.json").read_text(encoding="utf-8"))
    assert report["distill_config"]["seed"] == 3
    assert report["distill_config"]["call_kwargs"]["num_inference_steps"] == 2
    assert report["held_out_prompts_sha256"] == prompts_sha256(["two trees"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "kept", "out", "prompts.txt"]


def test_adapters_are_folded_into_the_teacher(source, adapters, prompts, tmp_path):
    style, other = adapters
    held_out = ["--held-out-prompts", prompts.with_name("held_out.jsonl"), "--work-dir", tmp_path / "run"]
    arguments = (source, tmp_path / "out", "--prompts", prompts, *held_out, "--lora", f"{style}=0.5")
    result = run(*arguments, "--lora", other)
    assert result.exit_code == ExitCode.OK, result.output
    report = json.loads((tmp_path / "out" / "distill.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["scale"]) for each in report["adapters"]] == [(style.name, 0.5), (other.name, 1.0)]
    result = run(*arguments, "--overwrite")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "checkpoints of another run (teacher: " in " ".join(result.output.split())


def test_prompts_are_held_out_by_their_hash(source, tmp_path):
    result = run(source, tmp_path / "out", "--prompts", "template:40")
    assert result.exit_code == ExitCode.OK, result.output
    report = json.loads((tmp_path / "out" / "distill.json").read_text(encoding="utf-8"))
    train, held_out = split_held_out(read_prompts("template:40"), 32)
    for name, expected in (("training", train), ("held_out", held_out)):
        assert report[f"{name}_prompts_sha256"] == prompts_sha256(expected)


def test_bad_input(source, prompts, tmp_path):
    held_out = prompts.with_name("held_out.jsonl")
    cases = {
        "32 of 3 different prompts": ([], ExitCode.BAD_INPUT),
        "mode='best' is not one of": (["--held-out-prompts", held_out, "--mode", "best"], ExitCode.USAGE),
        "held-out prompts": (["--held-out-prompts", prompts], ExitCode.BAD_INPUT),
        "takes no cfg": (["--held-out-prompts", held_out, "--set", "cfg=3"], ExitCode.BAD_INPUT),
        "not a folder of a packed": (["--held-out-prompts", held_out, "--student", tmp_path], ExitCode.BAD_INPUT),
    }
    for message, (extra, code) in cases.items():
        result = run(source, tmp_path / "out", "--prompts", prompts, *extra)
        assert result.exit_code == code, (message, result.output)
        assert message in " ".join(result.output.split()), result.output
        assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_before_anything_is_loaded(prompts, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    result = run(
        tmp_path / "nothing", target, "--prompts", prompts, "--held-out-prompts", prompts.with_name("held_out.jsonl")
    )
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "exists already" in result.output
    assert (target / "mine.txt").read_text() == "kept"


def test_an_interrupted_run_goes_on(source, prompts, tmp_path, monkeypatch):
    """The second call finds cache and run folder of the first, which stopped before it could save."""
    from diffusers import FluxPipeline

    arguments = (
        source,
        tmp_path / "out",
        "--prompts",
        prompts,
        "--held-out-prompts",
        prompts.with_name("held_out.jsonl"),
    )

    def fail(self, folder, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FluxPipeline, "save_pretrained", fail)
        result = run(*arguments)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.distillation" / "distill.json").is_file()
    result = run(*arguments, "--seed", 4)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "another run" in result.output
    result = run(*arguments)
    assert result.exit_code == ExitCode.OK, result.output
    assert not (tmp_path / ".out.distillation").exists()


def test_help_names_every_mode_and_the_launcher():
    command = typer.main.get_command(app).commands["distill"]
    assert all(option.help for option in command.params if option.name != "help")
    assert "accelerate launch -m diffusers_ternary.cli distill" in command.help
    shown = next(option.help for option in command.params if option.name == "mode")
    assert all(mode in shown for mode in ("scales", "blockwise", "full", "lora"))


@pytest.mark.slow
def test_two_processes_print_once(source, prompts, tmp_path):
    """Two gloo processes, in the environment that `accelerate launch` makes for two devices."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "diffusers_ternary.cli", "distill", str(source), str(tmp_path / "out"), "--prompts", str(prompts)]
    command += ["--held-out-prompts", str(prompts.with_name("held_out.jsonl")), *SMALL]
    root = str(pathlib.Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("saved to") == 1
    assert json.loads((tmp_path / "out" / "distill.json").read_text(encoding="utf-8"))["processes"] == 2
