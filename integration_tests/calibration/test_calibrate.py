# SPDX-License-Identifier: Apache-2.0
"""`calibrate` on stock pipelines: better than rounding, saved and loaded, resumed, and what it refuses."""

import json

import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.calibration import CalibrationConfig, CalibrationReport, SolverConfig, calibrate, store
from diffusers_ternary.calibration.run import CalibrationRun
from diffusers_ternary.layers import Int8Linear, TernaryLayer, TernaryLinear
from integration_tests.support.fresh_process import run_python
from integration_tests.support.pipelines import PIPELINES, draw, quiet


PROMPTS = ["a red cat", "a blue dog", "a house", "two trees"]
FAST = SolverConfig(descent_passes=2, starts=1)


def settings(name: str, **options) -> CalibrationConfig:
    tiny = PIPELINES[name]
    call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
    return CalibrationConfig(**{"call_kwargs": call, "batch_size": 2, "solver": FAST, **options})


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_comes_closer_than_by_rounding(name):
    tiny = PIPELINES[name]
    teacher, rounded, calibrated = (tiny.build() for _ in range(3))
    quantize(rounded, TernaryConfig())
    report = calibrate(calibrated, PROMPTS, TernaryConfig(), settings(name)).ternary_report
    model = getattr(calibrated, tiny.denoiser)
    assert {f"{tiny.denoiser}.{n}" for n, m in model.named_modules() if isinstance(m, TernaryLayer)} == {
        layer.name for layer in report.layers
    }
    assert all(layer.error <= layer.error_rounded * 1.001 for layer in report.layers)
    if name == "sdxl":
        return  # untrained, its latents grow 150-fold in the last step, which alone then decides the statistics
    expected = draw(name, teacher)
    distance = [float((draw(name, p) - expected).square().mean()) for p in (rounded, calibrated)]
    assert distance[1] < distance[0]


def test_saved_and_loaded_in_a_fresh_process_it_draws_the_same(tmp_path):
    pipeline = PIPELINES["flux"].build()
    calibrate(pipeline, PROMPTS, TernaryConfig(group_size=16), settings("flux"))
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        part.eval()  # built in memory, they would still drop out
    expected = draw("flux", pipeline)
    pipeline.save_pretrained(tmp_path)
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
    if torch.get_num_threads() == 1:
        assert found == expected.flatten().tolist()
    torch.testing.assert_close(torch.tensor(found), expected.flatten(), rtol=1e-4, atol=1e-5)


def test_deterministic_and_independent_of_the_memory_limit():
    states, passes = [], []
    model = PIPELINES["flux"].build().transformer
    widest = max(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    # Layers with the same input are gathered together: all of a block at most.
    block = model.single_transformer_blocks[0]
    outputs = sum(m.out_features**2 for m in block.modules() if isinstance(m, nn.Linear))
    for limit in (None, None, 4 * (widest * (widest + 1) + outputs)):
        pipeline = PIPELINES["flux"].build()
        report = calibrate(pipeline, PROMPTS, calibration=settings("flux", memory_limit=limit)).ternary_report
        states.append(packed_state(pipeline.transformer))
        passes.append(report.passes)
        assert limit is None or report.statistics_bytes <= limit
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    assert passes[:2] == [1, 1]
    assert passes[2] > 1


def test_int8_and_kept_layers():
    pipeline = PIPELINES["flux"].build()
    config = TernaryConfig(overrides={"*.ff.*": "int8", "*.norm1.linear": "keep"})
    calibrated, report = calibrate(pipeline, PROMPTS, config, settings("flux"), return_report=True)
    assert calibrated is pipeline
    assert pipeline.ternary_report is report
    assert isinstance(pipeline.transformer.transformer_blocks[0].ff.net[2], Int8Linear)
    assert type(pipeline.transformer.transformer_blocks[0].norm1.linear) is nn.Linear
    assert not any(".ff." in layer.name or ".norm1.linear" in layer.name for layer in report.layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    ternary = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in report.layers) / weights
    assert report.bits_per_weight > ternary, "int8 layers count"


def test_biases_change_only_when_asked():
    plain, corrected = PIPELINES["flux"].build(), PIPELINES["flux"].build()
    before = plain.transformer.transformer_blocks[0].ff.net[2].bias.detach().clone()
    calibrate(plain, PROMPTS, calibration=settings("flux", correct_bias=False))
    calibrate(corrected, PROMPTS, calibration=settings("flux"))
    assert torch.equal(plain.transformer.transformer_blocks[0].ff.net[2].bias, before)
    assert not torch.equal(corrected.transformer.transformer_blocks[0].ff.net[2].bias, before)


def test_an_interrupted_run_goes_on_from_the_finished_layers(tmp_path, monkeypatch):
    class InterruptedRunError(Exception):
        pass

    expected = PIPELINES["flux"].build()
    calibrate(expected, PROMPTS, calibration=settings("flux"))

    pipeline = PIPELINES["flux"].build()
    untouched = packed_state(pipeline.transformer)
    save, saved = store.LayerStore.save, []

    def save_until_interrupted(self, name, layer):
        if len(saved) == 5:
            raise InterruptedRunError
        saved.append(name)
        save(self, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(store.LayerStore, "save", save_until_interrupted)
        with pytest.raises(InterruptedRunError):
            calibrate(pipeline, PROMPTS, calibration=settings("flux"), work_dir=tmp_path)
    assert_same(packed_state(pipeline.transformer), untouched)

    report = calibrate(pipeline, PROMPTS, calibration=settings("flux"), work_dir=tmp_path).ternary_report
    assert {layer.name for layer in report.layers if layer.resumed} == set(saved)
    assert_same(packed_state(pipeline.transformer), packed_state(expected.transformer))

    again = PIPELINES["flux"].build()
    report = calibrate(again, PROMPTS, calibration=settings("flux"), work_dir=tmp_path).ternary_report
    assert all(layer.resumed for layer in report.layers)
    assert report.passes == 0
    assert_same(packed_state(again.transformer), packed_state(expected.transformer))


@pytest.mark.parametrize("change", ["prompts", "seed", "weights", "config", "solver"])
def test_finished_layers_of_other_settings_are_not_used(tmp_path, change):
    calibrate(PIPELINES["flux"].build(), PROMPTS, calibration=settings("flux"), work_dir=tmp_path)
    pipeline, prompts, config, options = PIPELINES["flux"].build(), PROMPTS, TernaryConfig(), {}
    if change == "prompts":
        prompts = PROMPTS[::-1]
    elif change == "seed":
        options = {"seed": 1}
    elif change == "weights":
        pipeline.text_encoder.get_input_embeddings().weight.data[0] += 1.0
    elif change == "config":
        config = TernaryConfig(group_size=16)
    else:
        options = {"solver": SolverConfig(descent_passes=1)}
    report = calibrate(pipeline, prompts, config, settings("flux", **options), work_dir=tmp_path).ternary_report
    assert not any(layer.resumed for layer in report.layers)


def test_a_damaged_file_of_a_finished_layer_is_calibrated_again(tmp_path):
    calibrate(PIPELINES["flux"].build(), PROMPTS, calibration=settings("flux"), work_dir=tmp_path)
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    report = calibrate(
        PIPELINES["flux"].build(), PROMPTS, calibration=settings("flux"), work_dir=tmp_path
    ).ternary_report
    assert [layer.name for layer in report.layers if not layer.resumed] == [damaged.stem]


def test_the_report_is_json_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = calibrate(PIPELINES["flux"].build(), PROMPTS, calibration=settings("flux", seed=7)).ternary_report
    assert isinstance(report, CalibrationReport)
    report.save_json(tmp_path / "report.json")
    report.plot(tmp_path / "report.png")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["prompts"] == 4
    assert len(content["prompts_sha256"]) == len(content["weights_sha256"]) == 64
    assert content["calibration"]["seed"] == 7
    assert content["layers"][0]["error"] < content["layers"][0]["error_rounded"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_what_cannot_be_calibrated():
    pipeline = PIPELINES["flux"].build()
    with pytest.raises(TypeError, match="takes a diffusers pipeline, got FluxTransformer2DModel"):
        calibrate(pipeline.transformer, PROMPTS)
    with pytest.raises(ValueError, match="has no component that denoises"):
        calibrate(quiet(type(pipeline)(**{**pipeline.components, "transformer": None})), PROMPTS)
    pipeline.transformer.transformer_blocks[0].ff.net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.ff\.net\.2: the weight holds 1 NaN"):
        calibrate(pipeline, PROMPTS, calibration=settings("flux"))
    with pytest.raises(ValueError, match="There are no prompts"):
        calibrate(pipeline, [])
    quantized = quantize(PIPELINES["flux"].build())
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(quantized, PROMPTS)


def test_running_out_of_memory_names_the_options(monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CalibrationRun, "_collect", exhausted)
    pipeline = PIPELINES["flux"].build()
    with pytest.raises(MemoryError, match=r"smaller memory_limit .* lower batch_size"):
        calibrate(pipeline, PROMPTS, calibration=settings("flux"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"seed": "x"}, TypeError, "seed='x'"),
        ({"accumulate": "float16"}, ValueError, "float32, float64"),
        ({"memory_limit": "lots"}, ValueError, "memory_limit='lots' is not a positive size such as '400MB'"),
        ({"memory_limit": 0}, ValueError, "positive size"),
    ],
)
def test_calibration_config_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        CalibrationConfig(**arguments)


def test_memory_limit_units():
    assert CalibrationConfig(memory_limit="2GB").memory_limit_bytes == 2 * 10**9
    assert CalibrationConfig(memory_limit="1MiB").memory_limit_bytes == 2**20


def test_sequential_layers_are_solved_for_the_inputs_behind_the_quantized_blocks(tmp_path):
    tiny = PIPELINES["sd3"]
    pipelines = [tiny.build() for _ in range(3)]
    plain, sequential, again = pipelines
    calibrate(plain, PROMPTS, TernaryConfig(group_size=16), settings("sd3"))
    options = settings("sd3", sequential=True)
    report = calibrate(sequential, PROMPTS, TernaryConfig(group_size=16), options, work_dir=tmp_path).ternary_report
    blocks = len(sequential.transformer.transformer_blocks)
    assert report.passes == blocks
    states = [packed_state(pipeline.transformer) for pipeline in (plain, sequential)]
    changed = {name.split(".")[1] for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {str(block) for block in range(1, blocks)}  # the first block has nothing before it

    # Interrupted: the last block is solved again, behind the same prefix.
    for file in tmp_path.glob(f"*transformer_blocks.{blocks - 1}.*"):
        file.unlink()
    resumed = calibrate(again, PROMPTS, TernaryConfig(group_size=16), options, work_dir=tmp_path).ternary_report
    assert resumed.passes == 1
    assert_same(packed_state(again.transformer), states[1])
    assert not any(isinstance(m, TernaryLinear) for m in tiny.build().transformer.modules())
