# SPDX-License-Identifier: Apache-2.0
"""A packed folder, read tensor by tensor, against the model that was saved into it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.backend.packed_folder import PackedFolder
from integration_tests.support import denoisers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A packed SANA (linear layers, convolutions, int8, rotation and correction), and its folder."""
    torch.manual_seed(0)
    model = denoisers.sana()
    overrides = {"*.attn1.to_q": "int8"}
    quantize(model, TernaryConfig(group_size=16, overrides=overrides, hadamard=16, rank=2))
    path = tmp_path_factory.mktemp("packed")
    model.save_pretrained(path)
    return model, path


def test_every_tensor_of_the_float_model(saved):
    model, path = saved
    folder = PackedFolder.open(path)
    layers = packed_layers(model)
    state = model.state_dict()
    assert folder.names() == set(denoisers.sana().state_dict())
    for name in folder.names():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith(".bias"):
            assert folder.spec(name) is None
            assert torch.equal(folder.dequantize(name), state[name])
        else:
            assert folder.spec(name) == layer.spec
            matrix = layer.dequantize(torch.float32).flatten(1)
            torch.testing.assert_close(folder.dequantize(name), matrix, rtol=1e-5, atol=1e-6)
            weight = folder.weight(name.removesuffix(".weight"))
            stored = weight.codes() if hasattr(weight, "codes") else weight.values
            assert torch.equal(folder.codes(name), stored)


def test_what_it_says_of_itself(saved):
    model, path = saved
    folder = PackedFolder.find(path)
    assert (folder.library, folder.class_name) == ("diffusers", "SanaTransformer2DModel")
    assert folder.path == path
    assert "quantization_config" not in folder.config
    assert folder.config["patch_size"] == model.config.patch_size
    folder.check_values()


def test_float_models_and_empty_folders_are_not_packed(tmp_path):
    denoisers.sana().save_pretrained(tmp_path / "float")
    (tmp_path / "empty").mkdir()
    for name in ("float", "empty"):
        assert PackedFolder.find(tmp_path / name) is None
        with pytest.raises(ValueError, match=f"{name} is not a packed model. Make one with"):
            PackedFolder.open(tmp_path / name)


def test_config_and_weights_must_agree(saved, tmp_path):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    weights = path / "diffusion_pytorch_model.safetensors"
    undeclared = {name: value for name, value in config.items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(undeclared))
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"holds packed weights, but its config\.json has no quantization_config"):
        PackedFolder.find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2)}, tmp_path / weights.name)
    with pytest.raises(ValueError, match="declares diffusers_ternary, but the weights beside it are not packed"):
        PackedFolder.find(tmp_path)


def test_a_changed_value_is_noticed_when_it_is_read(saved, tmp_path):
    from safetensors import safe_open

    _, path = saved
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] += 1
    with safe_open(file, "pt") as handle:
        save_file(tensors, tmp_path / file.name, handle.metadata())
    folder = PackedFolder.open(tmp_path)
    folder.read("proj_out.weight")
    with pytest.raises(ValueError, match=r"checksum of proj_out\.bias does not match"):
        folder.read("proj_out.bias")
    with pytest.raises(ValueError, match=r"checksum of proj_out\.bias does not match"):
        folder.check_values()
