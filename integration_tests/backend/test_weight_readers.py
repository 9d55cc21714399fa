# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight a model reads itself stay in float, whatever is asked for."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers, plan_conversion
from diffusers_ternary.backend.weight_readers import layers_read_by_model
from integration_tests.support import architectures, denoisers, text_encoders
from integration_tests.support.pipelines import autoencoder


# Class → layers, as the sources of diffusers say.
READ = {
    "AnyFlowTransformer3DModel": {"condition_embedder.delta_embedder.linear_1"},  # the gate is cast to its dtype
    "Cosmos3OmniTransformer": {"time_embedder.linear_1"},
    "HunyuanDiT2DModel": {f"time_extra_emb.pooler.{name}_proj" for name in "qkvc"},  # multiplied without the layer
    "WanAnimateTransformer3DModel": {"condition_embedder.time_embedder.linear_1"},
    "ZImageTransformer2DModel": {"t_embedder.mlp.0"},
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["int8", "ternary"])
@torch.no_grad()
def test_forced_overrides_draw_what_the_dequantized_model_draws(name, kind):
    model = architectures.build(name).eval()
    config = TernaryConfig(overrides={"*": kind}, activation_dtype="none", group_size=32)
    kept = plan_conversion(model, config).kept
    assert {layer for layer, reason in kept.items() if reason.startswith("its weight is read by")} == READ[name]
    quantize(model, config)
    expected = architectures.run(name, copy.deepcopy(model).dequantize())
    assert (architectures.run(name, model) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SkyReelsV2Transformer3DModel"])
def test_reads_that_leave_int8_alone_do_not_count(name):
    assert not [layer for layer in layers_read_by_model(architectures.build(name)) if "time_embedder" in layer]


def test_t5_casts_to_a_weight_unless_it_is_int8():
    assert not [layer for layer in layers_read_by_model(text_encoders.t5()) if layer.endswith(".wo")]


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=16, patch_size=8)), "patch_embedding"),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=16, patch_size=8)), "patch_embedding"),
    ],
)
@torch.no_grad()
def test_vision_encoders_cast_pictures_to_the_dtype_of_their_first_convolution(build, layer):
    model = quantize(build().eval(), TernaryConfig(overrides={"*": "int8"}))
    assert any(name.endswith("fc1") for name in packed_layers(model))
    assert not any(name.endswith(layer) for name in packed_layers(model))
    assert next(model.parameters()).is_floating_point()  # pipelines ask for this one's dtype
    expected = copy.deepcopy(model).dequantize()(torch.ones(1, 3, 16, 16)).last_hidden_state
    found = model(torch.ones(1, 3, 16, 16)).last_hidden_state
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_autoencoder_keeps_what_pipelines_ask_for_its_dtype():
    model = quantize(autoencoder(use_post_quant_conv=True), TernaryConfig(overrides={"*": "int8"}))
    assert type(model.post_quant_conv) is nn.Conv2d
    assert type(model.encoder.conv_in) is nn.Conv2d  # holds the first parameter


class Reader(nn.Module):
    """One layer for each way of reading a weight."""

    def __init__(self):
        super().__init__()
        for name in "abcdef":
            self.add_module(name, nn.Linear(4, 4))
        self.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.a.weight.data.zero_()

    def forward(self, x):
        x = x.to(self.a.weight.device, self.b.weight.dtype)
        layer = self.c
        x = nn.functional.linear(x, layer.weight)
        dtype = next(iter(self.d.parameters())).dtype
        if dtype != torch.int8:
            x = x.to(dtype)
        if self.e.weight.dtype != torch.int8:
            x = x.to(self.e.weight.dtype)
        wide = next(self.f.parameters()).dtype
        for part in self.stack:
            x = x @ part.weight
        return x.to(wide)


def test_ways_of_reading():
    assert set(layers_read_by_model(Reader())) == {"b", "c", "f", "stack.0", "stack.1"}


def test_denoisers_of_the_stock_pipelines_are_packed_as_ever():
    for build in (denoisers.flux, denoisers.sd3, denoisers.sana, denoisers.pixart, denoisers.sdxl_unet, denoisers.wan):
        kept = plan_conversion(build(), TernaryConfig()).kept
        assert not [layer for layer, reason in kept.items() if reason.startswith("its weight is read by")]
