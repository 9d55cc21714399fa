# SPDX-License-Identifier: Apache-2.0
"""What a source holds is found out before anything is loaded."""

import json

import pytest

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend.sources import load_quantized


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
