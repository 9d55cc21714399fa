# SPDX-License-Identifier: Apache-2.0
"""Per-component kinds: a ternary denoiser beside int8 text encoders, from one config."""

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.layers import Int8Linear, TernaryLinear
from integration_tests.support import text_encoders
from integration_tests.support.pipelines import PIPELINES, draw


CONFIG = TernaryConfig(components={"transformer": "ternary", "text_encoder": "int8", "text_encoder_2": "int8"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"].build().save_pretrained(path)
    return path


def kinds(model: torch.nn.Module) -> set[type]:
    return {type(layer) for layer in packed_layers(model).values()}


def test_each_component_gets_its_kind(folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=CONFIG)
    for part, kind in (("transformer", TernaryLinear), ("text_encoder", Int8Linear), ("text_encoder_2", Int8Linear)):
        assert kinds(getattr(pipeline, part)) == {kind}, part
    assert kinds(pipeline.vae) == set()
    latents = draw("flux", pipeline)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert kinds(again.text_encoder_2) == {Int8Linear}
    assert again.text_encoder_2.config.quantization_config == TernaryConfig(kind="int8")
    assert torch.equal(draw("flux", again), latents)
    in_memory = quantize(DiffusionPipeline.from_pretrained(folder), CONFIG)
    assert torch.equal(draw("flux", in_memory), latents)
    assert in_memory.text_encoder_2.config.quantization_config == TernaryConfig(kind="int8")


@pytest.mark.parametrize("name", ["clip", "t5", "gemma", "qwen3", "qwen_vl"])
def test_int8_is_safe_for_text_encoders_and_ternary_is_not(name):
    """Even of tiny random encoders: int8 changes the output by a percent or so, ternary rounding by tens."""
    tokens = torch.randint(2, 60, (1, 12), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def encode(kind: str | None) -> torch.Tensor:
        torch.manual_seed(0)
        encoder = getattr(text_encoders, name)().eval()
        if kind is not None:
            quantize(encoder, TernaryConfig(kind=kind, activation_dtype="none"))
        return encoder(tokens, output_hidden_states=True).hidden_states[-1]

    exact = encode(None)
    error = {kind: ((encode(kind) - exact).norm() / exact.norm()).item() for kind in ("int8", "ternary")}
    assert error["int8"] < 0.03, error
    assert error["ternary"] > 5 * error["int8"], error


def test_config_round_trip():
    assert TernaryConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.components_to_quantize == ["transformer", "text_encoder", "text_encoder_2"]
    assert CONFIG.for_component("vae") is None
    assert CONFIG.for_component("text_encoder") == TernaryConfig(kind="int8")
    listed = TernaryConfig(components=["transformer"])
    assert listed.for_component("transformer") is listed


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"components\['vae'\]='int4' is not one of ternary, int8"):
        TernaryConfig(components={"vae": "int4"})
    with pytest.raises(ValueError, match="kind='keep' is not one of ternary, int8"):
        TernaryConfig(kind="keep")
