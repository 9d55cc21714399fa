# SPDX-License-Identifier: Apache-2.0
"""Whole distillations of a tiny pipeline: modes, resumption, divergence, held-out prompts, bad input."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.distillation import DistillConfig, DistillReport, distill
from diffusers_ternary.distillation.trainee import ternary_layers
from diffusers_ternary.extras import MissingExtraError
from diffusers_ternary.files import lock, recover_folder
from diffusers_ternary.rollouts import prompts_sha256
from diffusers_ternary.rollouts.prompts import split_held_out
from integration_tests.support import distillation
from integration_tests.support.fresh_process import ROOT, run_python


RUN = "import json, sys; from integration_tests.support import distillation as d; "


def report(folder: Path) -> DistillReport:
    return DistillReport.load_json(folder / "distill.json")


@pytest.mark.parametrize("mode", ["scales", "full", "lora", "blockwise"])
def test_every_mode_learns(mode, tmp_path):
    changes = {"updates": 24, "other_lr": 1e-3} if mode == "blockwise" else {"updates": 12, "other_lr": 1e-3}
    student = distillation.run(tmp_path, mode=mode, rank=2, **changes)
    result = report(tmp_path)
    assert result.best_error < 0.8 * result.start_error
    assert result.stopped is None
    assert result.steps == changes["updates"]
    spent = [entry.cpu_seconds for entry in result.history]
    assert 0 == spent[0] < spent[-1] == result.cpu_seconds
    assert spent == sorted(spent)
    assert list(result.trained_parameters) == (
        ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "scales"]
        if mode == "blockwise"
        else [mode]
    )
    kept = type(student.transformer).from_pretrained(tmp_path / "best")
    assert distillation.weights_hash(kept) == distillation.weights_hash(student.transformer)
    assert all(layer.spec.rank == (2 if mode == "lora" else 0) for layer in ternary_layers(kept).values())


def test_the_teacher_is_not_changed_and_the_student_draws(tmp_path):
    pipeline = distillation.teacher()
    before = distillation.weights_hash(pipeline.transformer)
    student = distillation.run(tmp_path, pipeline=pipeline, updates=2)
    assert distillation.weights_hash(pipeline.transformer) == before
    assert not pipeline.transformer._forward_hooks
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())
    images = student("a red cat", output_type="latent", **distillation.CALL).images
    assert torch.isfinite(images).all()


def test_what_was_evaluated_is_what_is_kept(tmp_path):
    """The error in the report is that of the saved student, computed again from the file."""
    from diffusers_ternary.distillation.cache import TeacherCache
    from diffusers_ternary.distillation.held_out import HeldOutError

    pipeline = distillation.teacher()
    student = distillation.run(tmp_path, pipeline=pipeline, mode="full", updates=4)
    data = TeacherCache.open(tmp_path / "cache" / "held_out")
    error = HeldOutError(data, None, pipeline.transformer, batch_size=3, device=torch.device("cpu"))
    assert error.of(student.transformer) == pytest.approx(report(tmp_path).best_error, rel=1e-5)


def test_control_leaves_codes_and_scales_alone(tmp_path):
    start = quantize(copy.deepcopy(distillation.teacher().transformer), distillation.CONFIG)
    settings = distillation.settings(mode="scales", train_scales=False, train_other="all")
    student = distill(
        distillation.teacher(), distillation.PROMPTS, None, settings, tmp_path, student=start, progress=False
    )
    assert report(tmp_path).best_error < report(tmp_path).start_error
    for name, layer in ternary_layers(student.transformer).items():
        assert torch.equal(layer.dequantize(), start.get_submodule(name).dequantize())
    assert not torch.equal(student.transformer.proj_out.weight, start.proj_out.weight)


def test_starts_from_a_folder_and_from_calibration(tmp_path):
    from diffusers_ternary.calibration import CalibrationConfig

    distillation.run(tmp_path / "one", updates=1, calibration=CalibrationConfig(), calibration_prompts=4)
    rounded = distillation.run(tmp_path / "rounded", updates=1)
    assert report(tmp_path / "one").start_error < report(tmp_path / "rounded").start_error
    rounded.transformer.save_pretrained(tmp_path / "start")
    distill(
        distillation.teacher(),
        distillation.PROMPTS,
        None,
        distillation.settings(updates=1),
        tmp_path / "two",
        student=tmp_path / "start",
        progress=False,
    )
    assert report(tmp_path / "two").start_error == pytest.approx(report(tmp_path / "rounded").best_error, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kills"), [("full", (76, 23)), ("blockwise", (12, 77))])
def test_killed_and_resumed_is_bit_for_bit_the_same(mode, kills, tmp_path):
    """SIGKILL while caching (12), and between checkpoints; caching and set-up ask the teacher 59 times, later 14."""
    settings = {
        "mode": mode,
        "updates": 13,
        "checkpoint_every": 3,
        "evaluate_every": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = run_python(RUN + _HASH, tmp_path / "whole", json.dumps(settings))
    for calls in kills:
        _kill(tmp_path / "killed", calls, settings)
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000009" if mode == "full" else "step-00000006"]
    resumed = run_python(RUN + _HASH, tmp_path / "killed", json.dumps(settings))
    assert resumed == whole
    histories = [report(tmp_path / name).history for name in ("whole", "killed")]
    assert histories[0] == histories[1]


_HASH = "print(json.dumps(d.weights_hash(d.run(sys.argv[1], **json.loads(sys.argv[2])).transformer)))"


def _kill(folder: Path, calls: int, settings: dict) -> None:
    code = RUN + "d.run_until_killed(sys.argv[1], int(sys.argv[2]), **json.loads(sys.argv[3]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(calls), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]


def test_a_finished_run_is_only_loaded(tmp_path):
    first = distillation.run(tmp_path, updates=2)
    pipeline = distillation.teacher()
    pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("the teacher was asked again"))
    again = distillation.run(tmp_path, pipeline=pipeline, updates=2)
    assert distillation.weights_hash(again.transformer) == distillation.weights_hash(first.transformer)


def test_the_report_hangs_on_the_student(tmp_path):
    student = distillation.run(tmp_path, updates=1)
    assert student.ternary_report == report(tmp_path)
    settings = distillation.settings(updates=1)
    arguments = (distillation.teacher(), distillation.PROMPTS, distillation.CONFIG, settings, tmp_path)
    again, found = distill(*arguments, progress=False, return_report=True)
    assert found is again.ternary_report
    assert found == report(tmp_path)


def test_former_names_of_settings(tmp_path):
    with pytest.warns(FutureWarning, match="DistillConfig: .* is now called .*s") as seen:
        former = DistillConfig(**{"steps": 3, "gradient_accumulation": 2})
    assert len(seen) == 2
    assert former == DistillConfig(updates=3, gradient_accumulation_steps=2)
    with pytest.raises(TypeError, match="steps is the former name of updates, and both are given"):
        DistillConfig(**{"steps": 3, "updates": 3})


def test_a_run_folder_of_the_former_names_goes_on(tmp_path):
    distillation.run(tmp_path, updates=1)
    identity = json.loads((tmp_path / "run.json").read_text())
    former = {"distill_config.updates": "steps", "distill_config.gradient_accumulation_steps": "gradient_accumulation"}
    renamed = {f"distill_config.{former[name]}" if name in former else name: v for name, v in identity.items()}
    assert renamed.keys() != identity.keys()
    (tmp_path / "run.json").write_text(json.dumps(renamed))
    pipeline = distillation.teacher()
    pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("the run was started again"))
    distillation.run(tmp_path, pipeline=pipeline, updates=1)
    with pytest.raises(ValueError, match=r"updates: 1 there, 2 now"):
        distillation.run(tmp_path, updates=2)


def test_a_run_that_diverges_stops_with_the_best_student(tmp_path):
    student = distillation.run(tmp_path, mode="full", updates=200, latent_lr=1e4, scale_lr=1e4, other_lr=1e4)
    result = report(tmp_path)
    assert result.stopped is not None
    assert result.steps < 200
    assert result.best_error <= result.start_error
    assert all(torch.isfinite(p).all() for p in student.transformer.parameters() if p.is_floating_point())


def test_guidance_inputs_are_drawn(tmp_path):
    seen = []
    pipeline = distillation.teacher(guidance_embeds=True)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"].clone()), with_kwargs=True
    )
    distillation.run(tmp_path, pipeline=pipeline, updates=2, guidance_range=(2.0, 3.0))
    drawn = torch.cat(seen[-2:])
    assert len(drawn.unique()) == len(drawn)
    assert 2 <= float(drawn.min()) <= float(drawn.max()) <= 3


# --- bad input ------------------------------------------------------------------------------------------------------


def refuse(match, error=ValueError, *, folder, pipeline=None, prompts=distillation.PROMPTS, changes=None, **options):
    with pytest.raises(error, match=match):
        distill(
            pipeline or distillation.teacher(),
            prompts,
            distillation.CONFIG,
            distillation.settings(**(changes or {})),
            folder,
            progress=False,
            **options,
        )
    assert not Path(folder).exists() or not (Path(folder) / "distill.json").exists()


def test_a_quantized_teacher_is_refused(tmp_path):
    refuse("itself quantized", folder=tmp_path / "run", pipeline=quantize(distillation.teacher(), distillation.CONFIG))
    assert not (tmp_path / "run").exists()


def test_students_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "run"
    other = quantize(distillation.teacher(guidance_embeds=True).transformer, distillation.CONFIG)
    refuse("differ in architecture: .*guidance", folder=folder, student=other)
    refuse("no ternary layers", folder=folder, student=distillation.teacher())
    refuse("is not a folder", folder=folder, student=tmp_path / "nowhere")
    assert not folder.exists()


def test_prompts_are_checked(tmp_path):
    folder = tmp_path / "run"
    refuse("1 of 2 held-out prompts", folder=folder, held_out_prompts=["A  RED cat", "a house"])
    refuse("too few to hold out", folder=folder, prompts=["a cat"])
    refuse("one string", TypeError, folder=folder, prompts="a cat")
    refuse("is empty", folder=folder, prompts=["", *distillation.PROMPTS])
    assert not folder.exists()


def test_prompts_are_held_out_by_their_hash(tmp_path):
    """As the command does: the order of the list has no part in it."""
    prompts = [f"prompt {i}" for i in range(7)]
    train, unseen = split_held_out(prompts, 2)
    assert unseen != prompts[-2:]
    settings = distillation.settings(updates=1, held_out=2)
    distill(distillation.teacher(), prompts, distillation.CONFIG, settings, tmp_path, progress=False)
    result = report(tmp_path)
    assert result.training_prompts_sha256 == prompts_sha256(train)
    assert result.held_out_prompts_sha256 == prompts_sha256(unseen)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    refuse("holds no distillation run", FileExistsError, folder=tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]
    distillation.run(tmp_path / "run", updates=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"checkpoints of another run .*updates: 2 there, 3 now"):
        distillation.run(tmp_path / "run", updates=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_pipelines_without_one_denoiser_are_refused(tmp_path):
    with pytest.raises(TypeError, match="takes a diffusers pipeline"):
        distill(torch.nn.Linear(2, 2), distillation.PROMPTS, output_dir=tmp_path)
    config = TernaryConfig(components=["transformer", "text_encoder"])
    with pytest.raises(ValueError, match="one component at a time"):
        distill(distillation.teacher(), distillation.PROMPTS, config, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mode": "all"}, ValueError, "mode='all' is not one of scales, blockwise, full, lora"),
        ({"updates": 0}, ValueError, "updates=0 is below 1"),
        ({"updates": 2.5}, TypeError, "updates=2.5 is not an integer"),
        ({"cfg_dropout": 1.5}, ValueError, "cfg_dropout=1.5 is not a fraction"),
        ({"latent_lr": -1.0}, ValueError, "latent_lr=-1.0 is not a positive learning rate"),
        ({"trackers": "tensorboard"}, TypeError, "trackers='tensorboard' is one string"),
        ({"mixed_precision": "fp16"}, ValueError, "mixed_precision='fp16' is not one of"),
        ({"guidance_range": (5.0, 1.0)}, ValueError, "guidance_range"),
    ],
)
def test_impossible_settings_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        DistillConfig(**changes)


def test_settings_are_json():
    assert json.loads(json.dumps(DistillConfig(call_kwargs={"height": 8}).to_dict()))["call_kwargs"] == {"height": 8}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = distillation.run(tmp_path / "plain", mode="full", updates=2, gradient_checkpointing=False)
    checkpointed = distillation.run(tmp_path / "checkpointed", mode="full", updates=2, gradient_checkpointing=True)
    errors = [report(tmp_path / name).best_error for name in ("plain", "checkpointed")]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert type(plain.transformer) is type(checkpointed.transformer)


def test_a_folder_that_was_being_replaced_is_recovered(tmp_path):
    (tmp_path / ".best.0a1b2c3d.old").mkdir()
    (tmp_path / ".best.0a1b2c3d.old" / "config.json").write_text("{}")
    recover_folder(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "config.json").read_text() == "{}"


def test_the_teacher_teaches_in_evaluation_mode(tmp_path):
    """Also between the drawings: dropout would make every target random."""
    teacher = distillation.teacher()
    modes = []
    teacher.transformer.train().register_forward_pre_hook(lambda module, *_: modes.append(module.training))
    distillation.run(tmp_path / "run", pipeline=teacher, updates=2)
    assert len(modes) > 10
    assert not any(modes)
    assert teacher.transformer.training


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        lock(tmp_path / "run", "a test"),
        pytest.raises(BlockingIOError, match=r"run is in use by another distillation\. Wait until"),
    ):
        distillation.run(tmp_path / "run", updates=2)
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_left_is_removed(tmp_path):
    run = tmp_path / "run"
    for name in (".run.json.0a1b2c3d.partial", ".start.0a1b2c3d.partial"):  # the first that it writes
        run.mkdir(exist_ok=True)
        (run / name).write_text("half")
    distillation.run(run, updates=1)
    assert not list(run.rglob("*.partial"))
    assert report(run).steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw8bit"}, "optimizer='adamw8bit' needs bitsandbytes .* pip install bitsandbytes"),
        ({"trackers": ("wandb",)}, "The tracker wandb needs wandb .* pip install wandb"),
    ],
)
def test_a_missing_library_is_noticed_before_the_work(tmp_path, monkeypatch, changes, message):
    for name in ("bitsandbytes", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    teacher = distillation.teacher()
    teacher.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(MissingExtraError, match=message):
        distillation.run(tmp_path / "run", pipeline=teacher, **changes)
    assert not (tmp_path / "run").exists()
