# SPDX-License-Identifier: Apache-2.0
"""Saving models with adapters: refused with advice, or right; an adapter is never dropped or mislabeled."""

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders.lora_base import (
    _remove_text_encoder_monkey_patch,
    fuse_text_encoder_lora,
    unfuse_text_encoder_lora,
)
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import T5EncoderModel

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.backend.adapters import settle_merged
from diffusers_ternary.calibration.merge_lora import merge_lora
from diffusers_ternary.layers import QuantizedLayer, read_records
from diffusers_ternary.lora import TernaryLoraLinear
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.adapters import EXACT, difference
from integration_tests.support.denoisers import predict


LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"])


@pytest.fixture
def model() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return quantize(denoisers.pixart().eval(), EXACT)


def stored_names(folder) -> set[str]:
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as handle:
        return set(handle.keys())


@pytest.mark.parametrize("adapter", [LORA, LoHaConfig(r=2, target_modules=["to_q"])], ids=["lora", "loha"])
@pytest.mark.parametrize("merged", [False, True])
def test_injected_adapters_are_refused(model, adapter, merged, tmp_path):
    wrapped = get_peft_model(model, copy.deepcopy(adapter))
    if merged:
        wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"carries adapter layers.*save_lora_weights.*unload_lora_weights"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_unloaded_adapters_leave_no_trace(model, tmp_path):
    before = predict(model)
    get_peft_model(model, copy.deepcopy(LORA)).unload()
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PixArtTransformer2DModel.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("route", ["fused, then unloaded", "merge_and_unload"])
def test_merged_adapters_are_stored_in_float_layers(model, route, tmp_path, caplog):
    plain = predict(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    wrapped = get_peft_model(model, copy.deepcopy(LORA))
    adapted = {n for n, m in model.named_modules() if isinstance(m, TernaryLoraLinear)}
    if route == "merge_and_unload":
        model = wrapped.merge_and_unload()
    else:
        wrapped.merge_adapter()
        model = wrapped.unload()
    expected = predict(model)
    assert difference(expected, plain) > 0.01
    model.save_pretrained(tmp_path)
    assert f"{len(adapted)} of {len(packed)} packed layers hold a merged adapter" in caplog.text
    assert not any("fused" in name for name in stored_names(tmp_path))
    again = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert difference(predict(again), expected) < 1e-5
    assert {n for n, m in again.named_modules() if isinstance(m, QuantizedLayer)} == packed - adapted
    # What is left packed can be saved again, and the whole dequantized.
    again.save_pretrained(tmp_path / "twice")
    again.dequantize()
    assert difference(predict(again), expected) < 1e-4


def test_a_fused_model_dequantizes_to_what_it_computes(model):
    wrapped = get_peft_model(model, copy.deepcopy(LORA))
    wrapped.merge_adapter()
    model = wrapped.unload()
    expected = predict(model)
    model.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert difference(predict(model), expected) < 1e-5


def test_a_model_with_nothing_packed_left_says_so(model, tmp_path):
    targets = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    merged = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).merge_and_unload()
    with pytest.raises(ValueError, match=r"merged into all 20 packed layers.*model.dequantize\(\).*merge_lora"):
        merged.save_pretrained(tmp_path)


def test_saving_changes_nothing(model, tmp_path):
    wrapped = get_peft_model(model, copy.deepcopy(LORA))
    wrapped.merge_adapter()
    model = wrapped.unload()
    before, keys = predict(model), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    assert torch.equal(predict(model), before)


def test_a_bias_that_was_merged_is_stored():
    state = {
        "a.weight": torch.zeros(2, 1, dtype=torch.int8),
        "a.weight_scale": torch.zeros(2, 1, dtype=torch.int16),
        "a.bias": torch.zeros(2),
        "a.fused_weight": torch.ones(2, 4, dtype=torch.bfloat16),
        "a.fused_bias": torch.ones(2),
        "b.weight": torch.zeros(2, 1, dtype=torch.int8),
        "c.weight": torch.zeros(3),
    }
    tensors, packed = settle_merged(state, {"a": 1, "b": 2})
    assert packed == {"b": 2}
    assert tensors.keys() == {"a.weight", "a.bias", "b.weight", "c.weight"}
    assert torch.equal(tensors["a.weight"], torch.ones(2, 4, dtype=torch.bfloat16))
    assert torch.equal(tensors["a.bias"], torch.ones(2, dtype=torch.bfloat16))
    assert "a.fused_weight" in state


def test_overwritten_codes_are_refused():
    state = {"a.weight": torch.zeros(2, 1), "a.weight_scale": torch.zeros(2, 1, dtype=torch.int16)}
    with pytest.raises(ValueError, match=r"a.weight was overwritten with torch.float32"):
        settle_merged(state, {"a": 1})


def test_peft_saves_and_loads_the_adapter_itself(model, tmp_path):
    base = copy.deepcopy(model)
    wrapped = get_peft_model(model, copy.deepcopy(LORA))
    expected = predict(model)
    wrapped.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(predict(base), expected)


class TestTextEncoder:
    @staticmethod
    def encoder() -> T5EncoderModel:
        torch.manual_seed(0)
        return quantize(text_encoders.t5().eval(), EXACT)

    @staticmethod
    def encode(model: T5EncoderModel) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.arange(8)[None]).last_hidden_state

    def test_injected_adapters_are_refused(self, tmp_path):
        model = self.encoder()
        get_peft_model(model, LoraConfig(r=2, target_modules=["q", "wo"]))
        with pytest.raises(ValueError, match="carries adapter layers"):
            model.save_pretrained(tmp_path)

    def test_what_was_fused_and_unloaded_outlives_the_next_adapter(self, tmp_path):
        """The functions are those that pipelines fuse and unload the adapters of their text encoders with."""

        def add(model: nn.Module, name: str, seed: int) -> None:
            torch.manual_seed(seed)
            lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q", "wo"], init_lora_weights=False)
            model.add_adapter(lora, adapter_name=name)

        model, twin = self.encoder(), self.encoder()
        twin.dequantize()
        drawn: dict[str, list[torch.Tensor]] = {}
        for subject in (model, twin):
            results = drawn[type(subject.encoder.block[0].layer[0].SelfAttention.q).__name__] = []
            add(subject, "a", 1)
            fuse_text_encoder_lora(subject)
            _remove_text_encoder_monkey_patch(subject)
            results.append(self.encode(subject))
            add(subject, "b", 2)
            results.append(self.encode(subject))
            fuse_text_encoder_lora(subject)
            unfuse_text_encoder_lora(subject)
            results.append(self.encode(subject))
            _remove_text_encoder_monkey_patch(subject)
            results.append(self.encode(subject))
        for actual, expected in zip(*drawn.values(), strict=True):
            assert difference(actual, expected) < 1e-4
        a, both, unfused, unloaded = drawn["TernaryLinear"]
        assert torch.equal(both, unfused)
        assert torch.equal(a, unloaded)
        assert difference(both, a) > 0.01

    @pytest.mark.parametrize("method", [LoraConfig, LoHaConfig], ids=["lora", "loha"])
    def test_transformers_saves_its_own_adapters(self, method, tmp_path):
        """As of a float model: the adapter alone, which loads into the packed model again."""
        model, base = self.encoder(), self.encoder()
        plain = self.encode(model)
        model.add_adapter(method(r=2, target_modules=["q", "wo"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        expected = self.encode(model)
        assert difference(expected, plain) > 0.01
        model.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        base.load_adapter(tmp_path)
        assert torch.equal(self.encode(base), expected)
        # The float model behind it saves the same names.
        twin = text_encoders.t5()
        twin.add_adapter(method(r=2, target_modules=["q", "wo"]))
        twin.save_pretrained(tmp_path / "float")
        files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "float")]
        names = []
        for file in files:
            with safe_open(file, framework="pt") as handle:
                names.append(set(handle.keys()))
        assert names[0] == names[1]

    def test_merged_adapters_are_stored_in_float_layers(self, tmp_path):
        model = self.encoder()
        plain = self.encode(model)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "wo"], init_lora_weights=False))
        model = model.merge_and_unload()
        expected = self.encode(model)
        assert difference(expected, plain) > 0.01
        model.save_pretrained(tmp_path)
        again = T5EncoderModel.from_pretrained(tmp_path).eval()
        assert difference(self.encode(again), expected) < 1e-5
        assert type(again.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear


class TestRecordsAreThoseOfTheLiveModel:
    """What a file says of a layer is what the layer is when it is saved, not when the model was quantized."""

    @pytest.mark.parametrize("build", [denoisers.pixart, denoisers.sana], ids=["linear", "convolutions"])
    def test_one_adapter_merged_and_the_other_unloaded(self, build, tmp_path):
        torch.manual_seed(0)
        model = quantize(build().eval(), TernaryConfig(group_size=8, activation_dtype="none"))
        names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
        wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=names), "a")
        wrapped.add_adapter("b", LoraConfig(r=2, init_lora_weights=False, target_modules=names[:1]))
        wrapped.base_model.set_adapter(["a", "b"])
        merge_lora(wrapped, ["a"], requantize=False, rank=4)
        model = wrapped.unload()
        merged = {name: layer.dequantize() for name, layer in packed_layers(model).items()}
        assert merged.keys() == set(names)
        model.save_pretrained(tmp_path)
        again = packed_layers(type(model).from_pretrained(tmp_path))
        assert again.keys() == set(names)
        assert all(torch.equal(again[name].dequantize(), weight) for name, weight in merged.items())
        assert all(layer.spec.rank == 4 for layer in again.values())

    def test_a_copy_saves_its_own_layers(self, model, tmp_path):
        twin = copy.deepcopy(model)
        layer = packed_layers(twin)["transformer_blocks.0.attn1.to_q"]
        layer.pack(torch.ones(layer.weight_shape), rank=1)
        for folder, subject in (("model", model), ("twin", twin)):
            subject.save_pretrained(tmp_path / folder)
            again = PixArtTransformer2DModel.from_pretrained(tmp_path / folder)
            assert torch.equal(predict(again), predict(subject))

    def test_blocks_that_were_removed_are_gone(self, model, tmp_path):
        model.transformer_blocks = model.transformer_blocks[:1]
        model.register_to_config(num_layers=1)
        model.save_pretrained(tmp_path)
        assert torch.equal(predict(PixArtTransformer2DModel.from_pretrained(tmp_path)), predict(model))

    def test_a_pickled_state_dict_is_still_safe_to_load(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert read_records(state) == read_records(model.state_dict())
