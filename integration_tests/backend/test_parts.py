# SPDX-License-Identifier: Apache-2.0
"""transformers: a part of the model on disk, head and base classes, parts saved alone, configs of their own."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5EncoderModel,
)
from transformers.integrations.accelerate import compute_module_sizes

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from integration_tests.support import text_encoders
from integration_tests.support.checkpoints import edit_json


IDS = torch.arange(8)[None]


def llama_config() -> LlamaConfig:
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )


@torch.no_grad()
def hidden(model) -> torch.Tensor:
    """What the base model computes."""
    return getattr(model, "model", model).eval()(IDS).last_hidden_state


class TestPlacement:
    @pytest.mark.parametrize("build", [text_encoders.t5, lambda: LlamaModel(llama_config())])
    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    def test_a_block_on_disk(self, tmp_path, build, kind):
        model = quantize(build().eval(), TernaryConfig(kind=kind))
        model.save_pretrained(tmp_path)
        blocks = "encoder.block" if isinstance(model, T5EncoderModel) else "layers"
        where = {f"{blocks}.1": "cpu"}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in (
            "shared",
            "encoder.embed_tokens",
            "encoder.final_layer_norm",
            "embed_tokens",
            "norm",
            "rotary_emb",
        ):
            where |= {name: "cpu"} if name in modules else {}
        loaded = type(model).from_pretrained(
            tmp_path, device_map={**where, f"{blocks}.0": "disk"}, offload_folder=tmp_path / "offload"
        )
        on_disk = [name for name, layer in packed_layers(loaded).items() if layer.weight.is_meta]
        assert on_disk
        assert all(name.startswith(f"{blocks}.0.") for name in on_disk)
        with torch.no_grad():
            assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)

    @pytest.mark.parametrize("options", [{}, {"kind": "int8"}, {"overrides": {"*.mlp.*": "int8"}}, {"rank": 4}])
    def test_sizes_are_those_of_the_packed_model(self, options):
        config = TernaryConfig(scale_layout="group", **options)
        packed = quantize(LlamaModel(llama_config()).bfloat16(), config)
        with torch.device("meta"):
            model = LlamaModel(llama_config()).bfloat16()
        quantizer = type(packed.hf_quantizer)(config, pre_quantized=False)
        quantizer.preprocess_model(model=model, config=model.config)
        planned = compute_module_sizes(model, quantizer)[0][""]
        assert planned == pytest.approx(packed.get_memory_footprint(), rel=1e-6)

    def test_recovering_plans_with_float_sizes(self):
        with torch.device("meta"):
            model = LlamaModel(llama_config()).bfloat16()
        before = compute_module_sizes(model)[0][""]
        quantizer = type(quantize(LlamaModel(llama_config())).hf_quantizer)(TernaryConfig(rounding="recover"))
        quantizer.pre_quantized = False
        quantizer.preprocess_model(model=model, config=model.config)
        assert compute_module_sizes(model, quantizer)[0][""] == before


class TestHeads:
    @pytest.mark.parametrize(
        ("source", "target"),
        [
            (LlamaForCausalLM, LlamaModel),
            (LlamaModel, LlamaForCausalLM),
            (LlamaForCausalLM, LlamaForSequenceClassification),
            (LlamaModel, LlamaForSequenceClassification),
        ],
    )
    @pytest.mark.parametrize("kind", ["ternary", "int8"])
    def test_into_another_class_of_the_same_base(self, tmp_path, source, target, kind):
        model = quantize(source(llama_config()), TernaryConfig(kind=kind))
        model.save_pretrained(tmp_path)
        loaded = target.from_pretrained(tmp_path)
        assert len(packed_layers(loaded)) == len(packed_layers(model)) == 14
        assert torch.equal(hidden(loaded), hidden(model))
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(hidden(target.from_pretrained(tmp_path / "again")), hidden(model))

    def test_a_packed_head_is_left_out_of_the_base_class(self, tmp_path):
        model = quantize(LlamaForCausalLM(llama_config()), TernaryConfig(overrides={"lm_head": "int8"}))
        model.save_pretrained(tmp_path)
        assert "lm_head" in packed_layers(model)
        assert torch.equal(hidden(LlamaModel.from_pretrained(tmp_path)), hidden(model))

    def test_another_architecture_is_still_an_error(self, tmp_path):
        quantize(LlamaModel(llama_config())).save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", num_hidden_layers=1)
        for target in (LlamaModel, LlamaForCausalLM):
            with pytest.raises(ValueError, match=r"layers\.1\..* belong to another architecture"):
                target.from_pretrained(tmp_path)


class TestParts:
    def test_a_base_model_saved_alone(self, tmp_path):
        model = quantize(LlamaForCausalLM(llama_config()))
        model.model.save_pretrained(tmp_path)
        loaded = LlamaModel.from_pretrained(tmp_path)
        assert len(packed_layers(loaded)) == 14
        assert torch.equal(hidden(loaded), hidden(model))

    def test_of_a_loaded_model(self, tmp_path):
        quantize(LlamaForCausalLM(llama_config())).save_pretrained(tmp_path / "whole")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "whole")
        model.model.save_pretrained(tmp_path / "part")
        assert torch.equal(hidden(LlamaModel.from_pretrained(tmp_path / "part")), hidden(model))

    def test_a_tower_of_a_multimodal_model(self, tmp_path):
        model = quantize(text_encoders.qwen_vl())
        tower = model.model.language_model
        tower.save_pretrained(tmp_path / "tower")
        loaded = type(tower).from_pretrained(tmp_path / "tower")
        assert packed_layers(loaded).keys() == packed_layers(tower).keys()
        for name, layer in packed_layers(loaded).items():
            assert torch.equal(layer.dequantize(), packed_layers(tower)[name].dequantize())
        model.save_pretrained(tmp_path / "whole")
        assert '"quantization_config"' in (tmp_path / "whole/config.json").read_text()
        assert packed_layers(type(model).from_pretrained(tmp_path / "whole")).keys() == packed_layers(model).keys()

    def test_dequantized_parts_are_float_models(self, tmp_path):
        model = quantize(LlamaForCausalLM(llama_config())).dequantize()
        for part in (model, model.model):
            assert getattr(part, "hf_quantizer", None) is None
            assert getattr(part.config, "quantization_config", None) is None
        model.model.save_pretrained(tmp_path)
        assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path)), hidden(model))


class TestConfigs:
    @pytest.mark.parametrize("build", [LlamaForCausalLM, LlamaModel])
    def test_other_models_of_the_same_config_object_stay_float(self, tmp_path, build):
        config = llama_config()
        packed, plain = build(config), build(config)
        before = copy.deepcopy(config.to_dict())
        quantize(packed)
        assert config.to_dict() == before
        assert packed.config is not plain.config is config
        assert all(part.config is not config for part in packed.modules() if hasattr(part, "config"))
        plain.save_pretrained(tmp_path)
        assert not packed_layers(build.from_pretrained(tmp_path))
