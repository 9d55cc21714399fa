# SPDX-License-Identifier: Apache-2.0
"""`evaluate` end to end on tiny pipelines: known errors, nothing left behind, and what bad input says."""

import copy
import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler

import diffusers_ternary
from diffusers_ternary.evaluation import EvaluationResult, evaluate
from integration_tests.support.evaluate_pipelines import FLUX_CALL, PROMPTS, tiny_flux, tiny_stable_diffusion


GUIDED = {**FLUX_CALL, "negative_prompt": "", "true_cfg_scale": 2.0}


@pytest.fixture(scope="module")
def teacher() -> DiffusionPipeline:
    return tiny_flux()


@pytest.fixture(scope="module")
def result(teacher: DiffusionPipeline) -> EvaluationResult:
    return run(diffusers_ternary.quantize(tiny_flux()), teacher, scorers={"half": lambda images, prompts: 0.5})


def run(student: DiffusionPipeline, teacher: DiffusionPipeline, **options) -> EvaluationResult:
    return evaluate(student, teacher, PROMPTS, **{"call_kwargs": GUIDED, "progress": False, **options})


def scaled_output(factor: float) -> DiffusionPipeline:
    """The teacher with an output that is exactly `factor` times as large."""
    student = tiny_flux()
    with torch.no_grad():
        student.transformer.proj_out.weight.mul_(factor)
        student.transformer.proj_out.bias.mul_(factor)
    return student


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_velocity_error_of_a_scaled_teacher_is_known(teacher: DiffusionPipeline, factor: float) -> None:
    velocity = run(scaled_output(factor), teacher).velocity
    assert velocity is not None
    assert velocity.overall == pytest.approx((factor - 1) ** 2, rel=1e-6)
    assert velocity.per_step == pytest.approx([(factor - 1) ** 2] * 3, rel=1e-6)
    assert velocity.calls == 3 * 3 * 2  # prompts, steps, guidance branches
    assert velocity.timesteps == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-4)


def test_velocity_error_of_a_shifted_teacher_matches_a_direct_computation(teacher: DiffusionPipeline) -> None:
    shift = 0.25
    student = tiny_flux()
    with torch.no_grad():
        student.transformer.proj_out.bias.add_(shift)
    outputs: list[torch.Tensor] = []
    handle = teacher.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    for index, prompt in enumerate(PROMPTS):
        teacher(prompt, generator=torch.Generator().manual_seed(index), **GUIDED)
    handle.remove()
    expected = shift**2 / torch.stack(outputs).double().square().mean().item()
    velocity = run(student, teacher).velocity
    assert velocity is not None
    assert velocity.overall == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_flux, tiny_stable_diffusion])
def test_a_pipeline_in_training_mode_equals_itself(make) -> None:
    """Dropout in every part: the text encoder's own, and one more behind the denoiser's first projection."""
    pipeline = make()
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    first = next(name for name, part in denoiser.named_modules() if isinstance(part, torch.nn.Linear))
    denoiser.set_submodule(first, torch.nn.Sequential(denoiser.get_submodule(first), torch.nn.Dropout(0.5)))
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        part.train()
    result = run(pipeline, pipeline, call_kwargs={"height": 16, "width": 16, "num_inference_steps": 2})
    assert math.isinf(result.psnr_db)
    assert result.velocity is not None
    assert result.velocity.overall == 0.0
    assert all(module.training for part in parts for module in part.modules()), "the modes are given back"


@pytest.mark.parametrize("make", [tiny_flux, tiny_stable_diffusion])
def test_a_pipeline_equals_itself(make) -> None:
    pipeline = make()
    call = {"height": 16, "width": 16, "num_inference_steps": 2}
    same = run(pipeline, pipeline, call_kwargs=call)
    assert math.isinf(same.psnr_db)
    assert same.ssim == pytest.approx(1.0)
    assert same.velocity is not None
    assert same.velocity.overall == 0.0
    assert same.identical_images == len(PROMPTS)
    assert same.to_dict()["psnr_db"] is None
    assert "identical" in str(same)


def test_unet_pipelines_have_a_velocity_error_too() -> None:
    student = diffusers_ternary.quantize(tiny_stable_diffusion())
    velocity = run(
        student, tiny_stable_diffusion(), call_kwargs={"height": 16, "width": 16, "num_inference_steps": 2}
    ).velocity
    assert velocity is not None
    assert velocity.overall > 0
    assert len(velocity.per_step) == 2


def test_batch_size_changes_no_image(teacher: DiffusionPipeline, result: EvaluationResult) -> None:
    student = diffusers_ternary.quantize(tiny_flux())
    together = run(student, teacher, batch_size=2)
    assert together.psnr_db == pytest.approx(result.psnr_db, abs=0.05)
    assert together.velocity is not None
    assert result.velocity is not None
    assert together.velocity.overall == pytest.approx(result.velocity.overall, rel=1e-4)


def test_velocity_prompts_are_bounded(teacher: DiffusionPipeline) -> None:
    bounded = run(teacher, teacher, velocity_prompts=1).velocity
    assert bounded is not None
    assert bounded.prompts == 1
    assert run(teacher, teacher, velocity_prompts=0).velocity is None


def test_images_are_those_of_the_pipeline(teacher: DiffusionPipeline, result: EvaluationResult) -> None:
    image = teacher(PROMPTS[1], generator=torch.Generator().manual_seed(1), **GUIDED).images[0]
    assert image.tobytes() == result.teacher_images[1].tobytes()


def test_nothing_is_changed(teacher: DiffusionPipeline) -> None:
    student = diffusers_ternary.quantize(tiny_flux())
    student.set_progress_bar_config(desc="mine")
    before = hooks(student)
    weights = copy.deepcopy(student.transformer.state_dict())
    run(student, teacher)
    assert student._progress_bar_config == {"desc": "mine"}
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.transformer.state_dict().items())
    assert hooks(teacher) == 0
    assert hooks(student) == before  # quantize has one of its own


def test_hooks_are_removed_after_an_error(teacher: DiffusionPipeline) -> None:
    def interrupt(pipeline, step, timestep, tensors):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        run(tiny_flux(), teacher, call_kwargs={**GUIDED, "callback_on_step_end": interrupt})
    assert hooks(teacher) == 0


def hooks(pipeline: DiffusionPipeline) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipeline.transformer.modules()
    )


def test_scorers_see_both_sides(teacher: DiffusionPipeline, result: EvaluationResult) -> None:
    assert (result.scores["half"].student, result.scores["half"].teacher) == (0.5, 0.5)
    several = run(teacher, teacher, scorers={"judge": lambda images, prompts: {"a": 1, "b": len(images)}})
    assert several.scores["b"].student == 3.0
    clash = {"a": lambda images, prompts: 0.0, "judge": lambda images, prompts: {"a": 1.0}}
    with pytest.raises(ValueError, match="Two scorers report a"):
        run(teacher, teacher, scorers=clash)


def test_json_is_strict_and_complete(result: EvaluationResult, tmp_path) -> None:
    result.save_json(tmp_path / "result.json")
    data = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert list(data) == [
        "prompts",
        "image_size",
        "pipeline",
        "call_kwargs",
        "psnr_db",
        "identical_images",
        "ssim",
        "lpips",
        "unavailable",
        "velocity_nmse",
        "velocity",
        "benchmark",
        "scores",
        "seconds",
        "versions",
        "created",
        "images",
    ]
    assert [image["seed"] for image in data["images"]] == [0, 1, 2]
    assert data["psnr_db"] == result.psnr_db
    assert "lpips" in data["unavailable"]


def test_the_table_says_what_was_measured(result: EvaluationResult) -> None:
    text = str(result)
    for part in ("PSNR", "SSIM", "not available", "velocity NMSE", "3 prompts", "seeds 0 to 2"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2]}, "2 seeds for 3 prompts"),
        ({"seeds": [1, 2, -3]}, "seed -3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"velocity_prompts": -1}, "velocity_prompts=-1"),
        ({"call_kwargs": {"generator": 1}}, "call_kwargs sets generator"),
        ({"call_kwargs": {"stepz": 1}}, "takes no stepz"),
        ({"call_kwargs": {"num_inference_steps": 1}, "num_inference_steps": 2}, "given twice"),
    ],
)
def test_bad_options_are_named(teacher: DiffusionPipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(teacher, teacher, **options)


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), (["a", " "], r"prompts\[1\]=' ' is empty")])
def test_bad_prompts_are_named(teacher: DiffusionPipeline, prompts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(teacher, teacher, prompts)


def test_one_string_is_not_a_list_of_prompts(teacher: DiffusionPipeline) -> None:
    with pytest.raises(TypeError, match="one string"):
        evaluate(teacher, teacher, "a dog")


def test_another_architecture_is_refused(teacher: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=r"num_layers is 2 in the student's .* and 1 in the teacher's"):
        run(tiny_flux(num_layers=2), teacher)
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        run(tiny_stable_diffusion(), teacher)
    with pytest.raises(TypeError, match="not a diffusers pipeline"):
        run(teacher.transformer, teacher)


def test_another_scheduler_is_refused(teacher: DiffusionPipeline) -> None:
    student = tiny_flux()
    student.scheduler = type(student.scheduler).from_config(student.scheduler.config, shift=3.0)
    with pytest.raises(ValueError, match=r"shift is 3\.0 .* and 1\.0"):
        run(student, teacher)
    student.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        run(student, teacher)


def test_another_image_size_is_refused(teacher: DiffusionPipeline) -> None:
    student = tiny_flux()
    student.image_processor.postprocess = lambda image, output_type: [
        picture.resize((8, 8)) for picture in teacher.image_processor.postprocess(image, output_type=output_type)
    ]
    with pytest.raises(ValueError, match="8x8 pixels, the teacher of 16x16"):
        run(student, teacher)
