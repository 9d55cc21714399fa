# SPDX-License-Identifier: Apache-2.0
"""What a source holds is found out before anything is loaded."""

import json

import pytest
import torch

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend.sources import load_quantized, store_in_16_bits
from integration_tests.support.pipelines import PIPELINES


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither model_index.json"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": "[]"}, "JSON object"),
        ({"config.json": '{"_class_name": "NoSuchModel"}'}, "NoSuchModel"),
        ({"config.json": '{"architectures": ["NoSuchEncoder"]}'}, "NoSuchEncoder"),
        ({"config.json": '{"quantization_config": {"quant_method": "bitsandbytes"}}'}, "already .bitsandbytes"),
        (
            {
                "model_index.json": '{"transformer": ["diffusers", "FluxTransformer2DModel"]}',
                "transformer/config.json": '{"quantization_config": {"quant_method": "gguf"}}',
            },
            "transformer is quantized already .gguf",
        ),
        ({"model_index.json": '{"vae": ["diffusers", "AutoencoderKL"]}'}, "no component that denoises.*vae"),
    ],
)
def test_what_cannot_be_quantized_is_said_first(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_quantized(str(tmp_path), TernaryConfig())


def test_an_unknown_component_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "X"]}))
    with pytest.raises(ValueError, match=r"no component unet\. Choose from transformer"):
        load_quantized(str(tmp_path), TernaryConfig(components=["unet"]))


def test_a_missing_folder_is_no_hub_id_either():
    with pytest.raises(ValueError, match="is not a local folder"):
        load_quantized("no/such/folder/here", TernaryConfig())


def test_kept_layers_are_stored_in_16_bits_and_nothing_else_changes():
    pipeline = quantize(PIPELINES["flux"].build(), TernaryConfig(group_size=16))
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    text_encoder = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    store_in_16_bits(pipeline)
    after = pipeline.transformer.state_dict()
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {torch.float32}
    for name, tensor in before.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected), name
    for name, tensor in pipeline.text_encoder.state_dict().items():
        assert torch.equal(tensor, text_encoder[name])
        assert tensor.dtype == text_encoder[name].dtype


def test_float32_modules_stay_float32_when_stored():
    pipeline = quantize(PIPELINES["flux"].build(), TernaryConfig(group_size=16))
    pipeline.transformer._keep_in_fp32_modules = ["proj_out"]
    store_in_16_bits(pipeline)
    assert pipeline.transformer.proj_out.weight.dtype == torch.float32
    assert pipeline.transformer.x_embedder.weight.dtype == torch.bfloat16
