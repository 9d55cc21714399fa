# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary calibrate`: a folder in, a packed folder and a report out, and messages for bad input."""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ternary.calibration.store import LayerStore
from diffusers_ternary.cli.console import ExitCode
from diffusers_ternary.files import file_sha256, lock
from diffusers_ternary.interop.inspection import inspect_path
from integration_tests.support.command_line import run_command


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\na blue dog\n", encoding="utf-8")
    return path


def run(*arguments: object):
    small = ["--steps", "2", "--height", "16", "--width", "16", "--set", "max_sequence_length=16"]
    small += ["--passes", "1", "--starts", "1"]
    return run_command("calibrate", *arguments, *small, "--dtype", "float32", "--device", "cpu")


def test_writes_a_packed_pipeline_and_a_report(source, prompts, tmp_path):
    target = tmp_path / "out"
    result = run(source, target, "--prompts", prompts, "--group-size", 64, "--override", "*.ff.*=int8", "--seed", 5)
    assert result.exit_code == ExitCode.OK, result.output
    assert "bits per converted weight" in result.output
    assert [part.format_version for part in inspect_path(target) if part.name == "transformer"] == [2]
    report = json.loads((target / "calibration.json").read_text(encoding="utf-8"))
    assert report["prompts"] == 2
    assert report["calibration"]["seed"] == 5
    assert report["calibration"]["call_kwargs"]["num_inference_steps"] == 2
    assert {layer["group_size"] for layer in report["layers"] if layer["shape"][1] >= 64} == {64}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"], "no work directory is left"


def test_adapters_are_folded_in(source, adapters, prompts, tmp_path):
    style, other = adapters
    weights = {}
    for name, extra in {"plain": [], "tuned": ["--lora", f"{style}=0.5", "--lora", other]}.items():
        result = run(source, tmp_path / name, "--prompts", prompts, *extra)
        assert result.exit_code == ExitCode.OK, result.output
        report = json.loads((tmp_path / name / "calibration.json").read_text(encoding="utf-8"))
        weights[name] = report["weights_sha256"]
    assert "folded into the float model: style.safetensors at scale 0.5" in result.output
    assert "No LoRA keys" not in result.output
    assert report["adapters"] == [
        {"name": style.name, "scale": 0.5, "sha256": file_sha256(style)},
        {"name": other.name, "scale": 1.0, "sha256": file_sha256(other)},
    ]
    assert weights["plain"] != weights["tuned"]


@pytest.mark.parametrize(
    ("extra", "message", "code"),
    [
        (["{style}=much"], "the scale 'much' is not a number", ExitCode.USAGE),
        (["{style}=inf"], "not a finite number", ExitCode.USAGE),
        (["{style}", "{style}=0.5"], "is given twice", ExitCode.USAGE),
        (["{style}.missing"], "there is no file", ExitCode.USAGE),
        (["{source}/vae/diffusion_pytorch_model.safetensors"], "is not a LoRA", ExitCode.USAGE),
        (["{elsewhere}"], "an adapter of FluxPipeline", ExitCode.BAD_INPUT),
    ],
)
def test_bad_adapters(source, adapters, prompts, tmp_path, extra, message, code):
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2), "unet.x.lora_B.weight": torch.ones(2, 2)}, elsewhere)
    places = {"style": adapters[0], "source": source, "elsewhere": elsewhere}
    values = [part for value in extra for part in ("--lora", value.format(**places))]
    result = run(source, tmp_path / "out", "--prompts", prompts, *values, "--dry-run")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_size_budget_is_kept_and_its_ranking_shown(source, prompts, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "out"
    result = run(source, target, "--prompts", prompts, "--group-size", 16, "--size-budget", "4 bits")
    assert result.exit_code == ExitCode.OK, result.output
    assert "Sensitivity of the denoiser's output" in result.output
    assert "int8" in result.output
    report = json.loads((target / "calibration.json").read_text(encoding="utf-8"))
    assert report["bits_per_weight"] <= 4
    assert {row["chosen"] for row in report["sensitivity"]} > {"int8"}
    assert (target / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "message", "code"),
    [
        (["--set", "steps=3"], "FluxPipeline takes no steps", ExitCode.BAD_INPUT),
        (["--memory-limit", "1kB"], "Raise memory_limit", ExitCode.BAD_INPUT),
        (["--size-budget", "small"], "not a positive size such as '2.0 bits' or '400MB'", ExitCode.USAGE),
        (["--size-budget", "1 bits"], "below the smallest possible", ExitCode.BAD_INPUT),
        (["--damping", "0"], "damping=0.0 is not a positive number", ExitCode.USAGE),
        (["--component", "unet"], "has no component unet", ExitCode.BAD_INPUT),
        (["--override", "x"], "is not PATTERN=KIND", ExitCode.USAGE),
        (["--max-shard-size", "big"], "'big' is not a positive size", ExitCode.USAGE),
        (["--max-shard-size", "1e400GB"], "'1e400GB' is not a positive size", ExitCode.USAGE),
    ],
)
def test_bad_input_is_one_message(source, prompts, tmp_path, extra, message, code):
    result = run(source, tmp_path / "out", "--prompts", prompts, *extra)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_bad_prompt_files(source, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("ein Bär".encode("latin-1"))
    for file, message in ((empty, "holds no prompts"), (latin, "is not UTF-8"), (tmp_path / "no.txt", "no such file")):
        result = run(source, tmp_path / "out", "--prompts", file)
        assert result.exit_code == ExitCode.BAD_INPUT
        assert message in " ".join(result.output.split())


def test_an_interrupted_run_goes_on(source, prompts, tmp_path, monkeypatch):
    save, saved = LayerStore.save, []

    def save_until_interrupted(self, name, layer):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "save", save_until_interrupted)
        result = run(source, tmp_path / "out", "--prompts", prompts)
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "The same command goes on from there" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--prompts", prompts).exit_code == ExitCode.OK
    report = json.loads((tmp_path / "out" / "calibration.json").read_text(encoding="utf-8"))
    assert {layer["name"] for layer in report["layers"] if layer["resumed"]} == set(saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]


def test_a_quantized_pipeline_is_refused(source, prompts, tmp_path):
    assert run(source, tmp_path / "out", "--prompts", prompts).exit_code == ExitCode.OK
    result = run(tmp_path / "out", tmp_path / "again", "--prompts", prompts)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "quantized already" in result.output


def test_two_runs_do_not_share_a_work_folder(source, prompts, tmp_path):
    with lock(tmp_path / "work", "a test"):
        result = run(source, tmp_path / "out", "--prompts", prompts, "--work-dir", tmp_path / "work")
    assert result.exit_code == ExitCode.BAD_INPUT
    message = f"error: {tmp_path / 'work'} is in use by another calibration. Wait until that has ended, or choose"
    assert message in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]
