# SPDX-License-Identifier: Apache-2.0
"""`fold_adapters`: the weights of a fine-tune, what calibrate and distill make of it, and files that do not fit."""

import pathlib

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.calibration import CalibrationConfig, SolverConfig, calibrate
from diffusers_ternary.distillation import DistillConfig, distill
from diffusers_ternary.files import file_sha256
from diffusers_ternary.lora import FoldedAdapter, fold_adapters, folded_adapters
from integration_tests.support.adapters import lora_state, with_prefix
from integration_tests.support.pipelines import PIPELINES


pytestmark = pytest.mark.usefixtures("one_thread")
DENOISER_LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
ENCODER_LAYERS = ("encoder.layers.0.self_attn.q_proj",)
CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16}


def flux():
    return PIPELINES["flux"].build()


def encoder_name(pipeline, layer: str) -> str:
    """The text encoder's layer in this version of transformers, which may wrap all in `text_model`."""
    return f"text_model.{layer}" if hasattr(pipeline.text_encoder, "text_model") else layer


@pytest.fixture
def files(tmp_path) -> dict[pathlib.Path, float]:
    """Two adapters: of the transformer alone, and of the transformer and a text encoder."""
    pipeline = flux()
    style = with_prefix(lora_state(pipeline.transformer, rank=4, seed=0, names=DENOISER_LAYERS), "transformer")
    person = with_prefix(lora_state(pipeline.transformer, rank=2, seed=1, names=DENOISER_LAYERS[:1]), "transformer")
    names = [encoder_name(pipeline, name) for name in ENCODER_LAYERS]
    person |= with_prefix(lora_state(pipeline.text_encoder, rank=2, seed=2, names=names), "text_encoder")
    save_file(style, tmp_path / "style.safetensors")
    save_file(person, tmp_path / "person.safetensors")
    return {tmp_path / "style.safetensors": 0.75, tmp_path / "person.safetensors": -1.5}


def fused_by_hand(files: dict[pathlib.Path, float]):
    """W + scale B A for every pair in the files, in the order of the files."""
    from safetensors.torch import load_file

    pipeline = flux()
    for file, scale in files.items():
        state = load_file(file)
        for key, down in state.items():
            if key.endswith(".lora_A.weight"):
                component, _, layer = key.removesuffix(".lora_A.weight").partition(".")
                weight = pipeline.components[component].get_parameter(f"{layer}.weight")
                weight.data += state[key.replace("lora_A", "lora_B")] @ down * scale
    return pipeline


def states(pipeline) -> dict[str, dict[str, torch.Tensor]]:
    return {name: pipeline.components[name].state_dict() for name in ("transformer", "text_encoder")}


def test_weights_are_the_sum(files):
    folded, expected, plain = flux(), states(fused_by_hand(files)), states(flux())
    adapters = fold_adapters(folded, files)
    assert (
        adapters
        == folded_adapters(folded)
        == tuple(FoldedAdapter(file.name, scale, file_sha256(file)) for file, scale in files.items())
    )
    for component, state in states(folded).items():
        assert state.keys() == expected[component].keys(), "no adapter layer is left"
        for name, weight in state.items():
            torch.testing.assert_close(weight, expected[component][name], rtol=1e-6, atol=1e-6)
        changed = {name for name, weight in state.items() if not torch.equal(weight, plain[component][name])}
        layers = DENOISER_LAYERS if component == "transformer" else [encoder_name(folded, n) for n in ENCODER_LAYERS]
        assert changed == {f"{layer}.weight" for layer in layers}


def test_a_folder_of_save_lora_weights(files, tmp_path):
    style = next(iter(files))
    (tmp_path / "style").mkdir()
    style.rename(tmp_path / "style" / "pytorch_lora_weights.safetensors")
    folded = flux()
    assert [str(adapter) for adapter in fold_adapters(folded, {tmp_path / "style": 1})] == ["style at scale 1"]
    name = f"{DENOISER_LAYERS[0]}.weight"
    assert not torch.equal(folded.transformer.get_parameter(name), flux().transformer.get_parameter(name))


def test_calibrates_as_the_same_weights(files):
    folded, other = flux(), flux()
    fold_adapters(folded, files)
    for component, state in states(folded).items():
        other.components[component].load_state_dict(state)
    calibration = CalibrationConfig(solver=SolverConfig(descent_passes=1, starts=1), call_kwargs=CALL)
    for pipeline in (folded, other):
        calibrate(pipeline, ["a red cat", "a blue dog"], TernaryConfig(), calibration)
    for name, tensor in folded.transformer.state_dict().items():
        assert torch.equal(tensor, other.transformer.state_dict()[name]), name
    told = folded.ternary_report.to_dict()["adapters"]
    assert [(each["name"], each["scale"], len(each["sha256"])) for each in told] == [
        ("style.safetensors", 0.75, 64),
        ("person.safetensors", -1.5, 64),
    ]
    assert other.ternary_report.to_dict()["adapters"] == []


def test_a_distillation_of_other_adapters_is_another_run(files, tmp_path):
    style, person = files

    def run(adapters):
        pipeline = flux()
        fold_adapters(pipeline, adapters)
        config = DistillConfig(updates=1, batch_size=1, calibration=None, call_kwargs=CALL)
        options = {"held_out_prompts": ["two trees"], "progress": False}
        return distill(pipeline, ["a red cat"], TernaryConfig(), config, tmp_path / "run", **options)

    assert run({style: 1.0}).ternary_report.adapters == (FoldedAdapter(style.name, 1.0, file_sha256(style)),)
    for others in ({style: 0.5}, {person: 1.0}, {}):
        with pytest.raises(ValueError, match=r"checkpoints of another run \(teacher: "):
            run(others)
    assert run({style: 1.0}).ternary_report.adapters[0].name == "style.safetensors"


class TestRefused:
    @pytest.mark.parametrize(
        ("scale", "message"),
        [(float("nan"), "is nan, not a finite number"), ("0.8", "is '0.8', not a finite"), (True, "is True, not")],
    )
    def test_scales(self, files, scale, message):
        with pytest.raises(ValueError, match=message):
            fold_adapters(flux(), {next(iter(files)): scale})

    def test_files(self, files, tmp_path):
        torch.save({}, tmp_path / "lora.bin")
        save_file({"transformer.x_embedder.weight": torch.ones(2, 2)}, tmp_path / "whole.safetensors")
        damaged, control = tmp_path / "damaged.safetensors", tmp_path / "control.safetensors"
        damaged.write_bytes(b"not a header")
        key = "double_blocks.0.img_attn.norm.key_norm.scale"
        save_file({key: torch.ones(2), "img_in.lora_A.weight": torch.ones(2, 2)}, control)
        pipeline = flux()
        for name, message in {
            "user/adapter": "there is no file",
            "lora.bin": "is not a safetensors file",
            "whole.safetensors": "is not a LoRA: no tensor is named like",
            "damaged.safetensors": "damaged.safetensors",
            "control.safetensors": "also holds whole weights",
        }.items():
            with pytest.raises(ValueError, match=message):
                fold_adapters(pipeline, {tmp_path / name: 1.0})

    def test_the_same_adapter_twice(self, files, tmp_path):
        style = next(iter(files))
        twin = tmp_path / "twin.safetensors"
        twin.write_bytes(style.read_bytes())
        with pytest.raises(ValueError, match="the same adapter as"):
            fold_adapters(flux(), {style: 1.0, twin: 0.5})
        pipeline = flux()
        fold_adapters(pipeline, {style: 1.0})
        with pytest.raises(ValueError, match="folded into this pipeline already"):
            fold_adapters(pipeline, {twin: 0.5})

    @pytest.mark.parametrize("name", ["sdxl", "sd3", "wide"])
    def test_adapters_of_other_models(self, files, tmp_path, name):
        pipeline = flux()
        if name == "wide":
            layer = f"transformer.{DENOISER_LAYERS[0]}"
            state = {f"{layer}.lora_A.weight": torch.ones(2, 999), f"{layer}.lora_B.weight": torch.ones(999, 2)}
        else:
            other = PIPELINES[name].build()
            denoiser = getattr(other, PIPELINES[name].denoiser)
            ending = "attn2.to_k" if name == "sdxl" else "attn.to_q"
            layer = next(each for each, _ in denoiser.named_modules() if each.endswith(ending))
            layer_state = lora_state(denoiser, rank=2, seed=0, names=[layer])
            state = with_prefix(layer_state, PIPELINES[name].denoiser)
        save_file(state, tmp_path / "other.safetensors")
        before = states(pipeline)
        with pytest.raises(ValueError, match=r"other\.safetensors (cannot be loaded as|is not) an adapter of Flux"):
            fold_adapters(pipeline, {**files, tmp_path / "other.safetensors": 1.0})
        for component, state in states(pipeline).items():
            assert state.keys() == before[component].keys(), "no adapter layer is left"
            for key, weight in states(flux())[component].items():
                assert torch.equal(state[key], weight), "the pipeline is as it was"
        assert folded_adapters(pipeline) == ()

    def test_pipelines(self, files):
        style = next(iter(files))
        packed = flux()
        quantize(packed, TernaryConfig())
        with pytest.raises(ValueError, match=r"transformer is packed.*merge_lora"):
            fold_adapters(packed, {style: 1.0})
        loaded = flux()
        loaded.load_lora_weights(str(style), adapter_name="style")
        with pytest.raises(ValueError, match=r"carries adapters already \(style\)"):
            fold_adapters(loaded, {style: 1.0})
        with pytest.raises(TypeError, match="takes a diffusers pipeline"):
            fold_adapters(loaded.transformer, {style: 1.0})
