# SPDX-License-Identifier: Apache-2.0
"""The bfloat16 copy: equal to the dequantized model, in files that stock diffusers reads, one shard in memory."""

import json
import sys

import pytest
import torch

import diffusers_ternary
from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend.dequantize import dequantize_layers
from diffusers_ternary.hub.dense import dense_bytes, write_dense_copy
from diffusers_ternary.hub.source import read_source
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.checkpoints import edit_json
from integration_tests.support.fresh_process import run_python


CONFIGS = {
    "plain": TernaryConfig(),
    "per row": TernaryConfig(group_size=None, scale_layout="group"),
    "int8": TernaryConfig(overrides={"*.norm1*.linear": "int8"}),
    "rotated with correction": TernaryConfig(hadamard=64, rank=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_dequantized_model(tmp_path, name):
    torch.manual_seed(0)
    model = diffusers_ternary.quantize(denoisers.flux(), CONFIGS[name])
    check(model, tmp_path)


def test_convolutions_get_their_shape_back(tmp_path):
    torch.manual_seed(0)
    model = diffusers_ternary.quantize(denoisers.sana(), TernaryConfig(overrides={"*.ff.conv_inverted": "ternary"}))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "TernaryConv2d" in kinds
    check(model, tmp_path)


def test_text_encoders(tmp_path):
    torch.manual_seed(0)
    model = diffusers_ternary.quantize(text_encoders.t5(width=128))
    check(model, tmp_path, variant="bf16", dtype=torch.float32)


def check(model, tmp_path, **options) -> None:
    model.save_pretrained(tmp_path / "packed")
    part = read_source(tmp_path / "packed").packed[""]
    write_dense_copy(part, tmp_path / "dense", max_shard_bytes=200_000)
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1 or dense_bytes(part) < 200_000
    options = options or {"variant": "bf16", "torch_dtype": torch.float32}
    loaded = type(model).from_pretrained(tmp_path / "dense", **options)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    packed = set(part.layout.layers)
    dequantize_layers(model, torch.float32)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert expected.keys() == found.keys()
    for tensor, value in expected.items():
        if tensor.rpartition(".")[0] in packed and tensor.endswith(".weight"):
            value = value.to(torch.bfloat16).float()
        assert torch.equal(found[tensor], value), tensor


def test_a_config_of_another_architecture_is_refused(tmp_path):
    torch.manual_seed(0)
    diffusers_ternary.quantize(denoisers.flux()).save_pretrained(tmp_path / "packed")
    edit_json(tmp_path / "packed" / "config.json", num_attention_heads=4)
    part = read_source(tmp_path / "packed").packed[""]
    with pytest.raises(ValueError, match="does not fit the weights"):
        write_dense_copy(part, tmp_path / "dense")
    edit_json(tmp_path / "packed" / "config.json", _class_name="NoSuchModel")
    part = read_source(tmp_path / "packed").packed[""]
    with pytest.raises(ValueError, match="has no class NoSuchModel"):
        write_dense_copy(part, tmp_path / "dense")


SHARD = 20 * 10**6
# Page cache of mapped files, the copy of a tensor that is written, torch's own buffers.
SLACK = 60 * 10**6


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_holds_one_shard(tmp_path):
    model = denoisers.large_flux(1, 3)
    diffusers_ternary.quantize(model).save_pretrained(tmp_path / "packed")
    measured = run_python(
        """
        import json, resource, sys
        import pathlib
        import diffusers, transformers, torch
        from diffusers import FluxTransformer2DModel
        from diffusers_ternary.hub.dense import dense_bytes, write_dense_copy
        from diffusers_ternary.hub.source import read_source

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        part = read_source(sys.argv[1]).packed[""]
        before = peak()
        write_dense_copy(part, pathlib.Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3]))
        print(json.dumps({"grown": peak() - before, "total": dense_bytes(part)}))
        """,
        tmp_path / "packed",
        tmp_path / "dense",
        SHARD,
    )
    assert measured["total"] > 5 * SHARD, "the model must be much larger than a shard for the test to mean anything"
    assert measured["grown"] < SHARD + SLACK, measured
    assert 0.6 * measured["total"] > SHARD + SLACK
