# SPDX-License-Identifier: Apache-2.0
"""LoRA files as people publish them, on ternary denoisers: kohya's and original layouts, Flux's control LoRA."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.lora import TernaryLoKrLinear
from integration_tests.support.adapters import (
    Subject,
    difference,
    lora_state,
    packed_names,
    ternary_subject,
    with_prefix,
)


pytestmark = pytest.mark.usefixtures("one_thread")
RANK, ALPHA = 4, 3.0


def kohya(model: nn.Module, modules: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """A file of kohya's scripts: `lora_down`, `lora_up` and `alpha` for each key, fused projections row by row."""
    state = {}
    for seed, (key, names) in enumerate(modules.items()):
        parts = lora_state(model, rank=RANK, seed=seed, names=names)
        state[f"{key}.lora_down.weight"] = parts[f"{names[0]}.lora_A.weight"]
        state[f"{key}.lora_up.weight"] = torch.cat([parts[f"{name}.lora_B.weight"] for name in names])
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def flux_modules(model: nn.Module) -> dict[str, list[str]]:
    block, key = "transformer_blocks.0", "lora_unet_double_blocks_0"
    return {
        f"{key}_img_attn_qkv": [f"{block}.attn.to_{x}" for x in "qkv"],
        f"{key}_txt_attn_qkv": [f"{block}.attn.add_{x}_proj" for x in "qkv"],
        f"{key}_img_attn_proj": [f"{block}.attn.to_out.0"],
        f"{key}_img_mlp_0": [f"{block}.ff.net.0.proj"],
        f"{key}_img_mod_lin": [f"{block}.norm1.linear"],
        "lora_unet_single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
        "lora_unet_single_blocks_0_modulation_lin": ["single_transformer_blocks.0.norm.linear"],
    }


def wan_modules(model: nn.Module) -> dict[str, list[str]]:
    attention = {"self_attn": "attn1", "cross_attn": "attn2"}
    projections = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    modules = {
        f"lora_unet_blocks_{i}_{theirs}_{o}": [f"blocks.{i}.{ours}.{name}"]
        for i in range(2)
        for theirs, ours in attention.items()
        for o, name in projections.items()
    }
    for i in range(2):
        modules[f"lora_unet_blocks_{i}_ffn_0"] = [f"blocks.{i}.ffn.net.0.proj"]
        modules[f"lora_unet_blocks_{i}_ffn_2"] = [f"blocks.{i}.ffn.net.2"]
    return modules


def underscored(*endings: str) -> Callable[[nn.Module], dict[str, list[str]]]:
    """Layouts whose keys are the names of diffusers with underscores."""

    def modules(model: nn.Module) -> dict[str, list[str]]:
        names = [name for name in packed_names(model) if name.endswith(endings)]
        return {f"lora_unet_{name.replace('.', '_')}": [name] for name in names}

    return modules


LAYOUTS = {
    "flux": flux_modules,
    "sdxl": underscored("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2"),
    "qwen_image": underscored("attn.to_q", "attn.add_k_proj", "attn.to_out.0"),
    "z_image": underscored("attention.to_q", "attention.to_v"),
    "wan": wan_modules,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_kohya_layout(name, tmp_path):
    subject = ternary_subject(name)
    plain, dense = subject.run(), subject.twin(dequantized=True)
    modules = LAYOUTS[name](subject.denoiser)
    assert modules
    save_file(kohya(subject.denoiser, modules), tmp_path / "lora.safetensors")
    for one in (subject, dense):
        one.pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="style")
    assert difference(subject.run(), dense.run()) < 1e-4
    assert difference(subject.run(), plain) > 0.005
    adapted = {n for n, m in subject.denoiser.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {name for names in modules.values() for name in names}


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_original_prefix(name, tmp_path):
    """`diffusion_model.`, as ComfyUI and ai-toolkit write it."""
    subject = ternary_subject(name)
    dense = subject.twin(dequantized=True)
    names = [n for n in packed_names(subject.denoiser) if n.endswith(("to_q", "to_v"))]
    state = with_prefix(lora_state(subject.denoiser, rank=RANK, seed=0, names=names), "diffusion_model")
    save_file(state, tmp_path / "lora.safetensors")
    plain = subject.run()
    for one in (subject, dense):
        one.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="style")
    assert difference(subject.run(), dense.run()) < 1e-4
    assert difference(subject.run(), plain) > 0.005


def test_lokr_file(tmp_path):
    """Kronecker factors of the attention projections, as ai-toolkit writes them for Z-Image."""
    subject = ternary_subject("z_image")
    plain, dense = subject.run(), subject.twin(dequantized=True)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in packed_names(subject.denoiser):
        if name.endswith(("to_q", "to_v")):
            assert subject.denoiser.get_submodule(name).weight_shape == (64, 64)
            for factor in ("lokr_w1", "lokr_w2"):
                state[f"diffusion_model.{name}.{factor}"] = torch.randn(8, 8, generator=generator) * 0.2
    save_file(state, tmp_path / "lokr.safetensors")
    for one in (subject, dense):
        one.pipeline.load_lora_weights(str(tmp_path / "lokr.safetensors"), adapter_name="style")
    before = subject.run()
    assert any(isinstance(module, TernaryLoKrLinear) for module in subject.denoiser.modules())
    assert difference(before, dense.run()) < 1e-4
    assert difference(before, plain) > 0.005
    subject.pipeline.fuse_lora()
    assert difference(subject.run(), before) < 1e-4
    subject.pipeline.unfuse_lora()
    assert torch.equal(subject.run(), before)
    subject.pipeline.unload_lora_weights()
    assert torch.equal(subject.run(), plain)


class TestFluxControl:
    """LoRAs for twice the input channels: diffusers widens the input layer, and here that layer is ternary."""

    CONFIG = TernaryConfig(group_size=4, activation_dtype="none", overrides={"*": "ternary"})

    @pytest.fixture
    def pair(self) -> tuple[Subject, Subject]:
        subject = ternary_subject("flux", self.CONFIG)
        return subject, subject.twin(dequantized=True)

    @staticmethod
    def control_state(model: nn.Module) -> dict[str, torch.Tensor]:
        state = lora_state(model, rank=RANK, seed=0, names=[n for n in packed_names(model) if n != "x_embedder"])
        generator = torch.Generator().manual_seed(1)
        wide, rows = 2 * model.x_embedder.in_features, model.x_embedder.out_features
        state["x_embedder.lora_A.weight"] = torch.randn(RANK, wide, generator=generator)
        state["x_embedder.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
        state["transformer_blocks.0.attn.norm_q.weight"] = torch.full((32,), 1.5)
        return with_prefix(state, "transformer")

    @staticmethod
    def with_control(subject: Subject) -> Subject:
        hidden = subject.call["hidden_states"]
        wide = torch.cat([hidden, hidden.flip(1)], dim=-1)
        return Subject(subject.pipeline, subject.component, {**subject.call, "hidden_states": wide})

    def test_load_and_reset(self, pair):
        plain = pair[0].run()
        assert isinstance(pair[0].denoiser.x_embedder, QuantizedLayer)
        state = self.control_state(pair[0].denoiser)
        for subject in pair:
            subject.pipeline.load_lora_weights(dict(state), adapter_name="control")
            assert subject.denoiser.config.in_channels == 8
        actual, expected = (self.with_control(subject).run() for subject in pair)
        assert difference(actual, expected) < 1e-4
        # Only what the file widens is widened; everything else stays packed.
        layers = {n: m for n, m in pair[0].denoiser.named_modules() if isinstance(m, QuantizedLayer)}
        assert set(layers) == {f"{name}.base_layer" for name in packed_names(ternary_flux()) if name != "x_embedder"}
        for subject in pair:
            subject.pipeline.unload_lora_weights(reset_to_overwritten_params=True)
            assert subject.denoiser.config.in_channels == 4
        assert difference(pair[0].run(), plain) < 1e-4

    def test_fuse(self, pair):
        state = self.control_state(pair[0].denoiser)
        for subject in pair:
            subject.pipeline.load_lora_weights(dict(state), adapter_name="control")
            subject.pipeline.fuse_lora()
        actual, expected = (self.with_control(subject).run() for subject in pair)
        assert difference(actual, expected) < 1e-4

    def test_then_an_ordinary_adapter(self, pair):
        """diffusers pads it with zeros for the widened layer."""
        state = self.control_state(pair[0].denoiser)
        ordinary = with_prefix(lora_state(pair[0].denoiser, rank=2, seed=7), "transformer")
        for subject in pair:
            subject.pipeline.load_lora_weights(dict(state), adapter_name="control")
            subject.pipeline.load_lora_weights(copy.copy(ordinary), adapter_name="style")
            subject.pipeline.set_adapters(["control", "style"], [0.8, 0.6])
        actual, expected = (self.with_control(subject).run() for subject in pair)
        assert difference(actual, expected) < 1e-4

    @pytest.mark.parametrize("first", [False, True], ids=["alone", "beside another adapter"])
    def test_an_adapter_that_is_narrower_than_a_packed_layer(self, pair, first):
        """As of a model with fewer channels (Flux and Flux Fill): padded with zeros, as for float layers."""
        generator = torch.Generator().manual_seed(1)
        layer = pair[0].denoiser.x_embedder
        state = {
            "transformer.x_embedder.lora_A.weight": torch.randn(RANK, layer.in_features - 1, generator=generator),
            "transformer.x_embedder.lora_B.weight": torch.randn(layer.out_features, RANK, generator=generator),
        }
        plain = pair[0].run()
        for subject in pair:
            if first:
                other = with_prefix(lora_state(pair[0].denoiser, rank=2, seed=3, names=["x_embedder"]), "transformer")
                subject.pipeline.load_lora_weights(other, adapter_name="other")
            subject.pipeline.load_lora_weights(dict(state), adapter_name="narrow")
            subject.pipeline.set_adapters(["narrow"])
        assert isinstance(pair[0].denoiser.x_embedder.base_layer, QuantizedLayer)
        actual, expected = (subject.run() for subject in pair)
        assert difference(actual, expected) < 1e-4
        assert difference(actual, plain) > 1e-3

    def test_saving_after_the_reset(self, pair, tmp_path):
        subject = pair[0]
        plain, state = subject.run(), self.control_state(subject.denoiser)
        subject.pipeline.load_lora_weights(dict(state), adapter_name="control")
        subject.pipeline.unload_lora_weights(reset_to_overwritten_params=True)
        subject.denoiser.save_pretrained(tmp_path)
        subject.pipeline.transformer = type(subject.denoiser).from_pretrained(tmp_path)
        assert difference(subject.run(), plain) < 1e-5
        # diffusers put a float layer back; the others are still packed.
        assert type(subject.denoiser.x_embedder) is nn.Linear
        assert len(packed_names(subject.denoiser)) == len(packed_names(ternary_flux())) - 1


def ternary_flux() -> nn.Module:
    return ternary_subject("flux", TestFluxControl.CONFIG).denoiser


def test_an_ordinary_adapter_expands_nothing():
    """Without the patch, Flux's loader takes the packed shape for the layer's and replaces every packed layer."""
    subject = ternary_subject("flux")
    state = lora_state(subject.denoiser, rank=2, seed=0)
    subject.pipeline.load_lora_weights(with_prefix(state, "transformer"), adapter_name="style")
    layers = [m for m in subject.denoiser.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == len(packed_names(ternary_subject("flux").denoiser))
    assert getattr(subject.denoiser, "_overwritten_params", None) is None
