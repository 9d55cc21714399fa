# SPDX-License-Identifier: Apache-2.0
"""`merge_lora` against the arithmetic of adapters written by hand."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from diffusers_ternary import CalibrationConfig, TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.calibration import SolverConfig
from diffusers_ternary.calibration.merge_lora import merge_lora
from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from integration_tests.support import denoisers
from integration_tests.support.adapters import difference
from integration_tests.support.pipelines import PIPELINES, draw


EXACT = TernaryConfig(group_size=8, activation_dtype="none")
TARGETS = ["to_q", "to_v"]


def pipeline_with_adapters(name="sd3", adapters=("style",), config=EXACT, targets=TARGETS, strength=0.5):
    pipeline = quantize(PIPELINES[name].build(), config)
    model = getattr(pipeline, PIPELINES[name].denoiser).eval()
    for number, adapter in enumerate(adapters):
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)), adapter_name=adapter)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in model.named_parameters():
            if f".{adapter}." in key:
                parameter.data = (
                    strength * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                )
    model.set_adapters(list(adapters))
    return pipeline, model


def effective_weights(model, adapters=("style",)):
    """W + sum of B A (alpha / r = 1) of every adapted layer, by hand."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.dequantize(torch.float32).double()
            for adapter in adapters:
                weight = weight + module.lora_B[adapter].weight.double() @ module.lora_A[adapter].weight.double()
            weights[name] = weight.detach()
    return weights


def relative(error, weight):
    return float(error.square().sum() / weight.square().sum())


def test_new_codes_stand_for_weight_and_adapter(tmp_path):
    pipeline, model = pipeline_with_adapters()
    wanted = effective_weights(model)
    plain = {name: model.get_submodule(name).base_layer.dequantize().double() for name in wanted}
    untouched = {
        name: layer.weight.clone() for name, layer in packed_layers(model).items() if ".base_layer" not in name
    }
    merged, report = merge_lora(pipeline, return_report=True)
    assert merged is pipeline
    assert pipeline.ternary_report is report
    assert report.adapters == ("style",)
    assert report.requantized
    assert {row.name for row in report.layers} == {f"transformer.{name}" for name in wanted}
    for row in report.layers:
        name = row.name.removeprefix("transformer.")
        found = model.get_submodule(name).dequantize().double()
        assert row.error == pytest.approx(relative(wanted[name] - found, wanted[name]), rel=1e-3)
        assert row.adapter_energy == pytest.approx(relative(wanted[name] - plain[name], wanted[name]), rel=1e-3)
        assert row.error < 0.3
    for name, weight in untouched.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert not hasattr(model, "peft_config")
    assert not any("lora" in name for name, _ in model.named_modules())
    # What is left is an ordinary packed model.
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("data", [False, True])
def test_the_branch_takes_the_adapter_and_the_codes_stay(data):
    pipeline, model = pipeline_with_adapters(config=TernaryConfig(group_size=8, activation_dtype="none", hadamard=8))
    expected = draw("sd3", pipeline)
    codes = {
        name.removesuffix(".base_layer"): layer.weight.clone()
        for name, layer in packed_layers(model).items()
        if name.endswith(".base_layer")
    }
    prompts = ["a cat", "a dog"] if data else None
    report = merge_lora(
        pipeline, requantize=False, rank=2, prompts=prompts, calibration=calibration("sd3")
    ).ternary_report
    assert not report.requantized
    assert max(row.error for row in report.layers) < 1e-5  # rank 2 holds a rank-2 adapter, in float16
    for name, weight in codes.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, weight)
        assert (layer.spec.rank, layer.spec.hadamard) == (2, 8)
    assert difference(draw("sd3", pipeline), expected) < 2e-2


def calibration(name):
    tiny = PIPELINES[name]
    call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
    return CalibrationConfig(call_kwargs=call, batch_size=2, solver=SolverConfig(descent_passes=2, starts=1))


def test_statistics_lower_the_error_on_the_inputs():
    inputs: dict[str, list[torch.Tensor]] = {}
    errors = []
    for prompts in (None, ["a cat", "a dog", "a red house", "two trees"]):
        pipeline, model = pipeline_with_adapters()
        wanted = effective_weights(model)
        if prompts is None:
            hooks = [
                model.get_submodule(f"{name}.base_layer").register_forward_pre_hook(
                    lambda module, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2).double())
                )
                for name in wanted
            ]
            draw("sd3", pipeline)
            for hook in hooks:
                hook.remove()
        report = merge_lora(pipeline, prompts=prompts, calibration=calibration("sd3")).ternary_report
        assert report.prompts == len(prompts or ())
        error = 0.0
        for name, weight in wanted.items():
            x = torch.cat(inputs[name])
            error += relative(x @ (weight - model.get_submodule(name).dequantize().double()).T, x @ weight.T)
        errors.append(error)
    assert errors[1] < 0.7 * errors[0]


def test_the_other_adapter_stays():
    pipeline, model = pipeline_with_adapters(adapters=("style", "other"))
    expected = draw("sd3", pipeline)
    merge_lora(pipeline, ["style"], requantize=False, rank=2)
    assert list(model.peft_config) == ["other"]
    assert pipeline.get_active_adapters() == ["other"]
    assert difference(draw("sd3", pipeline), expected) < 2e-2


def test_float_layers_take_their_adapters_in():
    pipeline, model = pipeline_with_adapters(targets=["to_q", "proj_out"])
    expected = draw("sd3", pipeline)
    merge_lora(pipeline, requantize=False, rank=2)
    assert type(model.proj_out) is nn.Linear
    assert difference(draw("sd3", pipeline), expected) < 2e-2


def test_models_and_peft_models():
    torch.manual_seed(0)
    model = quantize(denoisers.pixart().eval(), EXACT)
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=TARGETS))
    wanted = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            wanted[name] = (module.base_layer.dequantize() + delta).detach()
    merge_lora(wrapped, requantize=False, rank=2)
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(name).dequantize(), weight, atol=5e-3, rtol=0)


@pytest.mark.parametrize("kept", ["none", "other"])
def test_what_was_trained_as_a_whole_stays(kept, tmp_path):
    """`modules_to_save`: PEFT's wrapper would be left, and the model could not be saved any more."""
    torch.manual_seed(0)
    model = quantize(denoisers.pixart().eval(), EXACT)
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, modules_to_save=["proj_out"])
    wrapped = get_peft_model(model, lora)
    trained = model.proj_out.modules_to_save["default"].weight
    torch.nn.init.normal_(trained)
    if kept == "other":
        wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["to_k"], modules_to_save=["proj_out"]))
    merge_lora(wrapped, rank=2)
    if kept == "other":
        assert torch.equal(model.proj_out.original_module.weight, trained)
        assert list(model.proj_out.modules_to_save) == ["other"]
        return
    assert type(model.proj_out) is nn.Linear
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.proj_out.weight, trained)
    assert packed_layers(again).keys() == packed_layers(model).keys()


def test_an_adapter_that_drowns_is_reported(caplog):
    pipeline, _ = pipeline_with_adapters(strength=0.01)
    with caplog.at_level(logging.WARNING, logger="diffusers_ternary"):
        report = merge_lora(pipeline).ternary_report
    assert all(row.error > 0.5 * row.adapter_energy for row in report.layers)
    assert "more than half of what the adapters add" in caplog.text


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"requantize": False}, ValueError, "give rank="),
        ({"adapter_names": ["typo"]}, ValueError, r"No adapter typo on packed layers; there are style"),
        ({"prompts": [" "]}, ValueError, "is empty"),
    ],
)
def test_refusals_change_nothing(options, error, message):
    pipeline, model = pipeline_with_adapters()
    before = state_of(model)
    with pytest.raises(error, match=message):
        merge_lora(pipeline, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_more_refusals():
    pipeline, model = pipeline_with_adapters()
    with pytest.raises(TypeError, match="prompts need a pipeline"):
        merge_lora(model, prompts=["a cat"])
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"are fused\. Call pipe\.unfuse_lora"):
        merge_lora(pipeline)
    with pytest.raises(ValueError, match="No packed layer carries an adapter"):
        merge_lora(quantize(PIPELINES["sd3"].build(), EXACT))
    with pytest.raises(TypeError, match="takes a pipeline or a model, got str"):
        merge_lora("folder")
    int8 = TernaryConfig(group_size=8, overrides={"*.to_q": "int8"})
    pipeline, _ = pipeline_with_adapters(config=int8)
    with pytest.raises(ValueError, match="is a Int8Linear, not a ternary layer"):
        merge_lora(pipeline)


class TestOverFusedAdapters:
    """A layer may hold an adapter that was fused and unloaded: `merge_lora` folds in both."""

    @pytest.mark.parametrize("requantize", [True, False])
    @pytest.mark.parametrize("name", ["sd3", "sdxl"])
    def test_both_are_in_the_packed_weight(self, name, requantize, tmp_path):
        pipeline, model = pipeline_with_adapters(name)
        pipeline.fuse_lora(components=[PIPELINES[name].denoiser])
        model.unload_lora()
        dense = {n: layer.dequantize().double() for n, layer in packed_layers(model).items()}
        config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
        model.add_adapter(config, adapter_name="second")
        wanted = effective_weights(model, ["second"])
        report = merge_lora(pipeline, requantize=requantize, rank=8).ternary_report
        for row in report.layers:
            layer = row.name.partition(".")[2]
            merged = model.get_submodule(layer)
            assert not merged.is_fused
            assert relative(merged.dequantize().double() - wanted[layer], wanted[layer]) == pytest.approx(
                row.error, rel=1e-3, abs=1e-9
            )
            assert relative(dense[layer] - wanted[layer], wanted[layer]) == pytest.approx(row.adapter_energy, rel=1e-3)
        model.save_pretrained(tmp_path)
        again = packed_layers(type(model).from_pretrained(tmp_path))
        for layer in wanted:
            assert torch.equal(again[layer].dequantize(), model.get_submodule(layer).dequantize())

    def test_a_fused_bias_is_not_lost(self):
        layer = TernaryLinear(TernarySpec(8, 16, 4), bias=True)
        layer.pack(torch.randn(8, 16))
        nn.init.zeros_(layer.bias)
        model = nn.Sequential(layer)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
        randomized = torch.Generator().manual_seed(0)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=randomized)
        wrapped.merge_adapter()
        model = wrapped.unload()
        bias = layer.active_bias.clone()
        assert not torch.equal(bias, layer.bias)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        merge_lora(wrapped, rank=2)
        torch.testing.assert_close(layer.bias, bias)


@pytest.mark.parametrize("kind", ["ternary", "int8"])
def test_packing_a_fused_layer_drops_the_fused_weight(kind):
    torch.manual_seed(0)
    cls, spec = {"ternary": (TernaryLinear, TernarySpec(8, 16, 4)), "int8": (Int8Linear, Int8Spec(8, 16))}[kind]
    layer, x = cls(spec, activation_dtype="none"), torch.randn(3, 16)
    layer.pack(torch.randn(8, 16))
    nn.init.normal_(layer.bias)
    layer.fuse(torch.randn(8, 16), torch.randn(8))
    layer.pack(torch.randn(8, 16))
    assert not layer.is_fused
    assert layer.fused_bias is None
    torch.testing.assert_close(layer(x), x @ layer.matrix(torch.float32).T + layer.bias)
