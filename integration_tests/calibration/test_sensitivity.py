# SPDX-License-Identifier: Apache-2.0
"""Sensitivities against a direct computation, and size budgets on a stock pipeline, saved and loaded."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import file_bytes, packed_layers
from diffusers_ternary.calibration import (
    CalibrationConfig,
    SensitivityConfig,
    SolverConfig,
    calibrate,
    sensitivity,
)
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from diffusers_ternary.rollouts import Rollouts, make_rollouts, recorded_calls
from integration_tests.support.fresh_process import run_python
from integration_tests.support.pipelines import PIPELINES, draw


PROMPTS = ["a red cat", "a blue dog"]
FAST = SolverConfig(descent_passes=1, starts=1)
MEASURE = SensitivityConfig(prompts=1, steps=2, group_sizes=(8,), ranks=(2,))
BASE = TernaryConfig(group_size=16)


def settings(**options) -> CalibrationConfig:
    tiny = PIPELINES["flux"]
    call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
    # Not what weighs the errors of the solver: it takes most of the time, and has tests of its own.
    fixed = {"call_kwargs": call, "solver": FAST, "sensitivity": MEASURE, "end_loss": False}
    return CalibrationConfig(**{**fixed, **options})


def build():
    pipeline = PIPELINES["flux"].build()
    pipeline.transformer.eval()
    return pipeline


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Finished layers and measurements, which do not depend on the budget."""
    folder = tmp_path_factory.mktemp("work")
    calibrate(build(), PROMPTS, BASE, settings(size_budget="8 bits"), work_dir=folder)
    return folder


def spend(work, budget, **options):
    pipeline = build()
    return pipeline, calibrate(
        pipeline, PROMPTS, BASE, settings(size_budget=budget, **options), work_dir=work
    ).ternary_report


def test_the_sensitivity_of_a_layer_is_that_of_the_denoiser_with_that_layer_replaced(work):
    pipeline, report = spend(work, "3 bits")
    teacher = build()
    rollouts = make_rollouts(teacher, PROMPTS[:1], seed=len(PROMPTS), batch_size=1, call_kwargs=settings().call_kwargs)
    with recorded_calls(teacher.transformer) as calls:
        rollouts.run(teacher, description="")
    row = next(row for row in report.sensitivity if row.chosen == "g16" and row.nmse["g16"] > 0)
    name = row.name.removeprefix("transformer.")
    student = copy.deepcopy(teacher.transformer)
    packed = pipeline.transformer.get_submodule(name)
    student.get_submodule(name).weight.data = packed.dequantize()
    if packed.bias is not None:
        student.get_submodule(name).bias.data = packed.bias.data
    errors = energy = 0.0
    with torch.no_grad():
        for call in calls:
            errors += float((student(*call.args, **call.kwargs)[0] - call.output).double().square().sum())
            energy += float(call.output.double().square().sum())
    assert row.nmse["g16"] == pytest.approx(errors / energy, rel=1e-4)
    assert row.nmse["keep"] == 0.0
    assert row.nmse["int8"] < row.nmse["g16"]


def test_the_ranking_starts_with_the_most_sensitive_layer(work):
    _, report = spend(work, "3 bits")
    errors = [row.nmse["g16"] for row in report.sensitivity]
    assert errors == sorted(errors, reverse=True)
    assert {row.name for row in report.sensitivity} >= {layer.name for layer in report.layers}


@pytest.mark.parametrize("bits", [2.9, 3.3, 4.0, 6.0])
def test_the_budget_is_kept_and_used(work, bits):
    pipeline, report = spend(work, f"{bits} bits")
    layers = packed_layers(pipeline.transformer)
    kept = [row for row in report.sensitivity if row.chosen == "keep"]
    stored = sum(file_bytes(layer.spec) for layer in layers.values()) + sum(row.bytes["keep"] for row in kept)
    weights = sum(layer.spec.weights for layer in layers.values()) + sum(a * b for a, b in (r.shape for r in kept))
    assert report.bits_per_weight == pytest.approx(8 * stored / weights)
    assert report.bits_per_weight <= bits
    assert sum(row.bytes[row.chosen] for row in report.sensitivity) == stored
    cheaper = [row for row in report.sensitivity if row.nmse[row.chosen] > 0]
    for row in cheaper:  # no single layer could still be improved with what is left
        room = bits * weights / 8 - stored + row.bytes[row.chosen]
        assert all(row.nmse[k] >= row.nmse[row.chosen] for k in row.nmse if row.bytes[k] <= room)


def test_a_larger_budget_leaves_less_error(work):
    reports = [spend(work, f"{bits} bits")[1] for bits in (2.9, 4.0, 7.0)]
    predicted = [sum(row.nmse[row.chosen] for row in report.sensitivity) for report in reports]
    assert predicted == sorted(predicted, reverse=True)
    assert reports[2].velocity_nmse["transformer"] < reports[0].velocity_nmse["transformer"]


def test_a_size_in_bytes_counts_all_weights_of_the_denoiser(work):
    rest_and_layers = sum(t.numel() * t.element_size() for t in build().transformer.state_dict().values())
    pipeline, _ = spend(work, rest_and_layers // 3)
    layers = packed_layers(pipeline.transformer)
    packed = {f"{name}.{part}" for name, layer in layers.items() for part in layer.packed_names}
    stored = sum(file_bytes(layer.spec) for layer in layers.values())
    stored += sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in pipeline.transformer.state_dict().items()
        if name not in packed
    )
    assert 0.9 * rest_and_layers // 3 < stored <= rest_and_layers // 3


def test_choices_are_saved_and_loaded(work, tmp_path):
    pipeline, report = spend(work, "6 bits")
    chosen = {row.name.removeprefix("transformer."): row.chosen for row in report.sensitivity}
    assert len(set(chosen.values())) > 2, "the budget mixes kinds"
    kinds = {"int8": Int8Linear, "keep": nn.Linear}
    for name, label in chosen.items():
        assert type(pipeline.transformer.get_submodule(name)) is kinds.get(label, TernaryLinear)
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        part.eval()
    expected = draw("flux", pipeline)
    pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]
    assert dict(config["overrides"]) == {n: k for n, k in chosen.items() if k in kinds}
    found = run_python(
        """
        import json, sys
        import diffusers_ternary
        from diffusers import FluxPipeline
        from integration_tests.support.pipelines import draw
        print(json.dumps(draw("flux", FluxPipeline.from_pretrained(sys.argv[1])).flatten().tolist()))
        """,
        tmp_path,
    )
    torch.testing.assert_close(torch.tensor(found), expected.flatten(), rtol=1e-4, atol=1e-5)


def test_a_budget_that_keeps_everything_is_refused_and_changes_nothing(monkeypatch):
    pipeline = build()
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    monkeypatch.setattr(sensitivity.TeacherStates, "error", lambda *args: 1.0)
    with pytest.raises(ValueError, match="keep every layer of transformer"):
        calibrate(pipeline, PROMPTS, BASE, settings(size_budget="32 bits"))
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("budget", "message"), [("1 bits", r"possible, \d\.\d+ bits"), (1000, r"possible, \d+ bytes")]
)
def test_an_impossible_budget_names_the_smallest_before_any_rollout(monkeypatch, budget, message):
    pipeline = build()
    monkeypatch.setattr(Rollouts, "draw", lambda *args: pytest.fail("the pipeline ran"))
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(pipeline, PROMPTS, BASE, settings(size_budget=budget))
    if isinstance(budget, str):
        smallest = float(str(caught.value).split("possible, ")[1].split(" bits")[0])
        monkeypatch.undo()
        report = calibrate(build(), PROMPTS, BASE, settings(size_budget=f"{smallest} bits")).ternary_report
        assert {row.chosen for row in report.sensitivity} == {"g16"}


def test_measurements_are_resumed(work, monkeypatch):
    monkeypatch.setattr(sensitivity.TeacherStates, "error", lambda *args: pytest.fail("measured again"))
    with pytest.raises(BaseException, match="measured again"):  # only the finished model is measured again
        spend(work, "3 bits")
    replayed = []
    monkeypatch.setattr(sensitivity.TeacherStates, "error", lambda *args: replayed.append(1) or 0.0)
    _, report = spend(work, "3 bits")
    assert len(replayed) == 1
    assert max(row.nmse["g16"] for row in report.sensitivity) > 0
    assert report.passes == 0


def test_measuring_without_a_budget_changes_no_choice():
    pipeline = build()
    report = calibrate(pipeline, PROMPTS, BASE, settings()).ternary_report
    assert {row.chosen for row in report.sensitivity} == {"g16"}
    assert all(set(row.nmse) == {"g16"} for row in report.sensitivity)
    assert report.velocity_nmse["transformer"] > 0


def test_low_rank_corrections_are_offered(work):
    _, report = spend(work, "5 bits")
    for row in report.sensitivity:
        assert "g16-r2" in row.nmse
        extra = 8 * (row.bytes["g16-r2"] - row.bytes["g16"])
        assert extra == 16 * 2 * sum(row.shape)
    assert sum(row.nmse["g16-r2"] for row in report.sensitivity) < sum(row.worst for row in report.sensitivity)


def test_running_out_of_memory_names_the_options(monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sensitivity.TeacherStates, "error", exhausted)
    with pytest.raises(MemoryError, match=r"lower batch_size, or enable pipeline\.enable_model_cpu_offload"):
        calibrate(build(), PROMPTS, BASE, settings())


def test_an_output_that_is_not_finite_names_the_layer(monkeypatch):
    monkeypatch.setattr(sensitivity.TeacherStates, "error", lambda *args: float("nan"))
    with pytest.raises(ValueError, match=r"transformer\.\S+: with g16 weights the denoiser's output holds NaN"):
        calibrate(build(), PROMPTS, BASE, settings())


def test_a_teacher_whose_output_is_not_finite_is_named():
    pipeline = build()
    pipeline.transformer.proj_out.weight.data[0, 0] = float("nan")
    # In one step, nothing but the output is NaN: more steps would find it in the statistics of the next one.
    call = {**settings().call_kwargs, "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"transformer: its own output holds NaN or Inf at step 0 \(timestep"):
        calibrate(pipeline, PROMPTS, BASE, settings(call_kwargs=call))
    with pytest.raises(ValueError, match=r"The denoiser's own output holds NaN or Inf\. Load the pipeline"):
        calibrate(pipeline, PROMPTS, BASE, settings(call_kwargs=call, end_loss=True))


@pytest.mark.parametrize(
    "arguments", [{"prompts": 0}, {"steps": -1}, {"group_sizes": (64, 0)}, {"ranks": ("a",)}, {"prompts": True}]
)
def test_sensitivity_config_rejects(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}=.* is not a positive integer"):
        SensitivityConfig(**arguments)


@pytest.fixture(autouse=True)
def quiet_loggers(caplog):
    caplog.set_level(logging.ERROR)
