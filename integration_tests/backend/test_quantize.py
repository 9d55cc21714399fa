# SPDX-License-Identifier: Apache-2.0
"""`quantize` on models in memory: all or nothing."""

import pytest
import torch
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import bits_per_weight, packed_layers
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from integration_tests.support import denoisers
from integration_tests.support.pipelines import PIPELINES


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert getattr(model, "hf_quantizer", None) is None
    assert "quantization_config" not in getattr(model, "config", {})


def plain_model(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(64, 64, **options)})]))


class TestPlainModules:
    def test_in_place(self):
        model = plain_model()
        assert quantize(model) is model
        assert type(model[0]) is nn.Linear
        assert type(model[1][0]["to_q"]) is TernaryLinear

    def test_biases_are_the_same_objects(self):
        model = plain_model()
        bias = model[1][0]["to_q"].bias
        quantize(model)
        assert model[1][0]["to_q"].bias is bias

    def test_training_mode_and_dtype_are_kept(self):
        model = plain_model(dtype=torch.bfloat16).eval()
        quantize(model)
        assert not model[1][0]["to_q"].training
        assert model[1][0]["to_q"].bias.dtype == torch.bfloat16

    def test_options_reach_the_layers(self):
        config = TernaryConfig(activation_dtype="int8", compute_dtype="float16", group_size=16, scale_layout="group")
        layer = quantize(plain_model(), config)[1][0]["to_q"]
        assert layer.activation_dtype == "int8"
        assert layer.compute_dtype == torch.float16
        assert layer.spec.group_size == 16
        assert layer.spec.scales == "group"

    def test_int8(self):
        layer = quantize(plain_model(), TernaryConfig(overrides={"*": "int8"}))[1][0]["to_q"]
        assert type(layer) is Int8Linear

    def test_bits_per_weight(self):
        model = quantize(plain_model(), TernaryConfig(group_size=32, scale_layout="group"))
        specs = {name: layer.spec for name, layer in packed_layers(model).items()}
        # 4096 codes in 820 bytes, 128 scales of 2 bytes.
        assert bits_per_weight(specs) == pytest.approx(8 * (820 + 256) / 4096)


class TestRefusals:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_in_the_last_layer_changes_nothing(self, bad):
        model = denoisers.pixart()
        model.transformer_blocks[1].ff.net[2].weight.data[0, 0] = bad
        before = state_of(model)
        with pytest.raises(ValueError, match=r"transformer_blocks\.1\.ff\.net\.2: the weight holds 1 NaN or Inf"):
            quantize(model)
        for state in (before, model.state_dict()):  # NaN is not equal to itself
            state["transformer_blocks.1.ff.net.2.weight"][0, 0] = 7.0
        assert_untouched(model, before)

    def test_twice(self):
        model = quantize(denoisers.pixart())
        with pytest.raises(ValueError, match=r"quantized already \(diffusers_ternary\).*dequantize"):
            quantize(model)
        plain = quantize(plain_model())
        with pytest.raises(ValueError, match=r"quantized already \(packed layers\)"):
            quantize(plain)

    def test_again_after_dequantize(self):
        model = quantize(denoisers.pixart())
        model.dequantize()
        dense = model.transformer_blocks[0].attn1.to_q.weight.clone()
        quantize(model, TernaryConfig(group_size=16))
        # The weights are ternary already: packed as they are, not rounded a second time.
        layer = packed_layers(model)["transformer_blocks.0.attn1.to_q"]
        assert layer.spec.group_size == 64
        assert torch.equal(layer.dequantize(dense.dtype), dense)

    def test_adapters(self):
        model = denoisers.sd3()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        before = state_of(model)
        with pytest.raises(ValueError, match="carries adapter layers"):
            quantize(model)
        assert model.state_dict().keys() == before.keys()

    def test_fused_adapters_are_to_be_unloaded(self):
        model = denoisers.sd3()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        with pytest.raises(ValueError, match=r"Fuse the adapters .*and unload them"):
            quantize(model)
        model.fuse_lora()
        with pytest.raises(ValueError, match=r"whose adapters are fused\. Unload them.*stays in the weights"):
            quantize(model)
        model.unload_lora()
        quantize(model)

    def test_meta_weights(self):
        with torch.device("meta"):
            model = denoisers.pixart()
        with pytest.raises(ValueError, match="weights that are not in memory"):
            quantize(model)

    @pytest.mark.parametrize("thing", [None, "folder", {"a": 1}, torch.zeros(2, 2)])
    def test_what_is_no_model(self, thing):
        with pytest.raises(TypeError, match="takes a model or a pipeline, got"):
            quantize(thing)

    def test_a_pipeline_component_that_fails_leaves_the_others_alone(self):
        pipeline = PIPELINES["flux"].build()
        pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] = float("nan")
        before = state_of(pipeline.transformer)
        with pytest.raises(ValueError, match=r"SelfAttention\.q: the weight holds 1 NaN"):
            quantize(pipeline, TernaryConfig(components=["transformer", "text_encoder_2"]))
        assert_untouched(pipeline.transformer, before)

    def test_a_pipeline_without_the_component(self):
        with pytest.raises(ValueError, match=r"FluxPipeline has no component prior.*transformer"):
            quantize(PIPELINES["flux"].build(), TernaryConfig(components=["prior"]))

    def test_a_model_without_blocks(self):
        adapter = ImageProjection(image_embed_dim=8, cross_attention_dim=8)
        before = state_of(adapter)
        with pytest.raises(ValueError, match="ImageProjection has no layer to convert"):
            quantize(adapter)
        assert_untouched(adapter, before)
