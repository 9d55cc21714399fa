# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary evaluate`: files in, report out, and an exit code that means something."""

import json
import re
import shutil
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffusers_ternary
from diffusers_ternary.cli.console import ExitCode
from diffusers_ternary.cli.options import load_pipeline, read_prompts
from integration_tests.support.adapters import lora_state, with_prefix
from integration_tests.support.command_line import run_command
from integration_tests.support.evaluate_pipelines import tiny_flux


CALL = ["--steps", "2", "--height", "16", "--width", "16", "--set", "max_sequence_length=16", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    tiny_flux().save_pretrained(root / "teacher")
    student = diffusers_ternary.quantize(tiny_flux())
    student.save_pretrained(root / "student")
    tiny_flux(num_layers=2).save_pretrained(root / "other")
    (root / "prompts.txt").write_text("a dog\n\n  two cats \n", encoding="utf-8")
    return root


def invoke(
    folders, *arguments: object, student: str = "student", prompts: str | None = None, stdin: str | None = None
):
    models = folders / student, folders / "teacher"
    return run_command(
        "evaluate", *models, "--prompts", prompts or folders / "prompts.txt", *CALL, *arguments, stdin=stdin
    )


def test_a_report_is_written(folders, tmp_path) -> None:
    outcome = invoke(folders, "--report", tmp_path / "out", "--limit", 1)
    assert outcome.exit_code == ExitCode.OK, outcome.output
    data = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert data["prompts"] == 1
    assert data["call_kwargs"] == {
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "num_inference_steps": 2,
    }
    assert data["velocity_nmse"] > 0
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_denoiser_alone_is_put_into_the_teacher(folders) -> None:
    whole = invoke(folders)
    part = invoke(folders, student="student/transformer")
    assert part.exit_code == ExitCode.OK, part.output
    psnr = [next(line for line in out.stdout.splitlines() if "PSNR" in line) for out in (whole, part)]
    assert psnr[0] == psnr[1]


def test_adapters_are_folded_into_the_teacher(folders, tmp_path) -> None:
    state = lora_state(tiny_flux().transformer, rank=2, seed=0, names=["transformer_blocks.0.attn.to_q"])
    save_file(with_prefix(state, "transformer"), tmp_path / "style.safetensors")
    adapter = f"{tmp_path / 'style.safetensors'}=0.5"
    same, changed = (invoke(folders, *extra, student="teacher") for extra in ((), ("--lora", adapter)))
    assert changed.exit_code == ExitCode.OK, changed.output
    assert "folded into the float model: style.safetensors at scale 0.5" in changed.output
    psnr = [next(line for line in out.stdout.splitlines() if "PSNR" in line) for out in (same, changed)]
    assert psnr[0] != psnr[1]
    assert invoke(folders, "--lora", tmp_path / "none.safetensors").exit_code == ExitCode.USAGE


def test_time_and_memory_are_predicted(folders) -> None:
    assert re.search(r"predicted: about [\d.]+ s on cpu, [\d.]+ [kM]B \(weights alone\)", invoke(folders).stdout)


def test_prompts_from_stdin(folders) -> None:
    outcome = invoke(folders, prompts="-", stdin="a dog\na cat\na cow\n")
    assert outcome.exit_code == ExitCode.OK, outcome.output
    assert "3 prompts" in outcome.output


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--set", "nonsense"], "is not NAME=VALUE", ExitCode.USAGE),
        (["--set", "height=8"], "given twice", ExitCode.USAGE),
        (["--set", "stepz=8"], "takes no stepz", ExitCode.BAD_INPUT),
        (["--dtype", "int3"], "'int3' is not one of", ExitCode.USAGE),
        (["--device", "toaster"], "'toaster' is not a device", ExitCode.USAGE),
        (["--device", "meta"], "'meta' is not available here", ExitCode.USAGE),
        (["--device", "cuda:99"], "'cuda:99' is not available here", ExitCode.USAGE),
        (["--clip", "missing"], "not a local CLIP checkpoint", ExitCode.BAD_INPUT),
    ],
)
def test_bad_options_say_what_is_wrong(folders, options: list[str], message: str, code: ExitCode) -> None:
    outcome = invoke(folders, *options)
    assert outcome.exit_code == code, outcome.output
    assert message in outcome.output


def test_a_failed_run_leaves_no_report(folders, tmp_path) -> None:
    outcome = invoke(folders, "--report", tmp_path / "out", student="other")
    assert outcome.exit_code == ExitCode.BAD_INPUT, outcome.output
    assert "num_layers" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_an_existing_report_is_kept(folders, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    outcome = invoke(folders, "--report", tmp_path)
    assert outcome.exit_code == ExitCode.BAD_INPUT
    assert "--overwrite" in outcome.output
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_wrong_usage_exits_with_2(folders) -> None:
    assert invoke(folders, "--steps", "0").exit_code == ExitCode.USAGE


@pytest.mark.parametrize("source", ["/no/such/folder", "no such name", "nobody/nothing"])
def test_a_source_that_is_nowhere_is_one_sentence(folders, source) -> None:
    for student, teacher in ((folders / "student", source), (source, folders / "teacher")):
        outcome = run_command("evaluate", student, teacher, "--prompts", folders / "prompts.txt", *CALL)
        assert outcome.exit_code == ExitCode.BAD_INPUT, outcome.output
        assert outcome.output.startswith(f"error: {source} is not a local folder, ")
        assert outcome.output.count("\n") == 1


def test_a_missing_library_is_noticed_before_the_work(folders, tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the work has begun"))
    outcome = invoke(folders, "--report", tmp_path / "out")
    assert outcome.exit_code == ExitCode.BAD_INPUT, outcome.output
    assert "needs matplotlib" in outcome.output
    assert "pip install diffusers-ternary[evaluate]" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_dtype_reaches_the_models(folders) -> None:

    assert load_pipeline(str(folders / "teacher"), torch.bfloat16).transformer.dtype == torch.bfloat16


def test_prompt_files(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Hund\r\nfünf Kühe\r\n猫\u2028犬\n".encode())
    assert read_prompts(str(path)) == ["ein Hund", "fünf Kühe", "猫\u2028犬"]
    assert read_prompts(str(path), 1) == ["ein Hund"]
    path.write_bytes("ein Hund\nfünf Kühe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8 \(line 2"):
        read_prompts(str(path))
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(str(path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "alone"])
def test_scaled_8_bit_floats_are_no_teacher_and_no_student(folders, tmp_path, part) -> None:
    """The hosts load them without their scales, and say so in a warning at most."""
    place = tmp_path / "scaled"
    shutil.copytree(folders / "teacher", place)
    (file,) = (place / part.replace("alone", "transformer")).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if name.endswith("q_proj.weight") or "to_q.weight" in name)
    scale = tensors[name].float().abs().max() / 448
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    tensors[name.replace(".weight", ".scale_weight")] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    outcome = invoke(folders, student=str(file.parent if part == "alone" else place))
    assert outcome.exit_code == ExitCode.BAD_INPUT, outcome.output
    assert f"8-bit floats with scales ({name})" in " ".join(outcome.output.split())
    if part != "alone":
        with pytest.raises(ValueError, match="Start from the float weights"):
            load_pipeline(str(place), torch.float32)  # also the way of calibrate and distill
