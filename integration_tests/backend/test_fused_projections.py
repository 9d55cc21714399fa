# SPDX-License-Identifier: Apache-2.0
"""Fused query, key and value projections are copies: what changes layers works on the originals, and saves them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate, quantize
from diffusers_ternary.backend import packed_layers, plan_conversion
from diffusers_ternary.calibration import SolverConfig
from diffusers_ternary.calibration.merge_lora import merge_lora
from integration_tests.support import architectures
from integration_tests.support.pipelines import PIPELINES, draw


EXACT = TernaryConfig(activation_dtype="none")
# Of both implementations in diffusers: attention modules of their own, and the older common class.
MODELS = ["FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"]


def copies(model):
    return {
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("to_qkv", "to_kv", "to_added_qkv")
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [EXACT, TernaryConfig(activation_dtype="none", hadamard=8, rank=2)])
def test_fuse_then_quantize_is_quantize_then_fuse(name, config, tmp_path):
    expected = quantize(architectures.build(name), config)
    plain = architectures.run(name, expected)
    model = architectures.build(name)
    model.fuse_qkv_projections()
    fused = copies(model)
    quantize(model, config)
    assert copies(model) == fused  # still fused, and of the same codes
    assert fused < packed_layers(model).keys()
    assert packed_layers(model).keys() - fused == packed_layers(expected).keys()
    torch.testing.assert_close(architectures.run(name, model), plain, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "fused")
    model.unfuse_qkv_projections()
    assert torch.equal(architectures.run(name, model), plain)
    model.save_pretrained(tmp_path / "separate")
    for folder in ("fused", "separate"):
        again = type(model).from_pretrained(tmp_path / folder)
        assert torch.equal(architectures.run(name, again), plain)


def test_a_plan_holds_no_copies():
    model = architectures.build("FluxTransformer2DModel")
    kinds = plan_conversion(model, EXACT).kinds
    model.fuse_qkv_projections()
    assert plan_conversion(model, EXACT).kinds == kinds
    everything = plan_conversion(model, TernaryConfig(overrides={"*": "int8"})).kinds
    assert not copies(model) & everything.keys()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_calibrate_sees_the_inputs_of_all_projections(name):
    settings = CalibrationConfig(
        call_kwargs={"height": 16, "width": 16, "num_inference_steps": 1, **PIPELINES[name].call},
        batch_size=1,
        solver=SolverConfig(refit=False, descent_passes=0, starts=1),
    )
    pipelines = {"separate": PIPELINES[name].build(), "fused": PIPELINES[name].build()}
    pipelines["fused"].transformer.fuse_qkv_projections()
    fused = copies(pipelines["fused"].transformer)
    reports = {
        key: calibrate(pipeline, ["a cat"], EXACT, settings).ternary_report for key, pipeline in pipelines.items()
    }
    layers = {key: {layer.name: layer.error for layer in report.layers} for key, report in reports.items()}
    assert layers["fused"] == layers["separate"]
    assert copies(pipelines["fused"].transformer) == fused
    own, theirs = (pipelines[key].transformer.state_dict() for key in ("fused", "separate"))
    assert all(torch.equal(own[key], tensor) for key, tensor in theirs.items())
    for pipeline in pipelines.values():
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
    torch.testing.assert_close(*(draw(name, pipeline) for pipeline in pipelines.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_merge_lora_reaches_the_copies(name, tmp_path):
    model = quantize(architectures.build(name), EXACT)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    model.fuse_qkv_projections()
    for subject in (model, twin):
        torch.set_rng_state(state)
        subject.add_adapter(config)
        merge_lora(subject, requantize=False, rank=4)
    expected = architectures.run(name, twin)
    torch.testing.assert_close(architectures.run(name, model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(architectures.run(name, type(model).from_pretrained(tmp_path)), expected)


def test_an_adapter_of_the_fused_projection_is_not_dropped(tmp_path):
    model = quantize(architectures.build("FluxTransformer2DModel"), EXACT)
    model.fuse_qkv_projections()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False))
    merged = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match=r"to_qkv holds other weights than .*to_q.*unfuse_qkv_projections"):
        merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_layers_that_cannot_be_joined_stay_separate(caplog):
    name, config = "FluxTransformer2DModel", TernaryConfig(activation_dtype="none", overrides={"*.attn.to_k": "int8"})
    expected = architectures.run(name, quantize(architectures.build(name), config))
    model = architectures.build(name)
    model.fuse_qkv_projections()
    quantize(model, config)
    assert "stay separate" in caplog.text
    assert not copies(model)
    assert torch.equal(architectures.run(name, model), expected)


@pytest.mark.parametrize("route", ["merge_and_unload", "fuse and unload"])
def test_adapters_that_were_merged_into_one_of_the_sources_are_stored(route, tmp_path):
    """diffusers runs the copy without the adapter, on float models too; the file holds the layers themselves."""
    model = quantize(architectures.build("FluxTransformer2DModel"), EXACT)
    model.fuse_qkv_projections()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    if route == "fuse and unload":
        wrapped.merge_adapter()
    merged = wrapped.merge_and_unload() if route == "merge_and_unload" else wrapped.unload()
    weight = merged.transformer_blocks[0].attn.to_q
    weight = weight.dequantize() if hasattr(weight, "dequantize") else weight.weight
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).transformer_blocks[0].attn.to_q
    torch.testing.assert_close(again.weight, weight)
