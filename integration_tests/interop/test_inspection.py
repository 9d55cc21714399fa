# SPDX-License-Identifier: Apache-2.0
"""`inspect` against the files themselves."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.interop.inspection import inspect_path
from integration_tests.support import denoisers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed")
    config = TernaryConfig(overrides={"norm1.linear": "int8"})
    quantize(denoisers.flux(), config).save_pretrained(path / "transformer", max_shard_size="300KB")
    denoisers.flux().save_pretrained(path / "float")
    return path


def test_bytes_are_those_of_the_files(folder):
    float_part, packed = inspect_path(folder)
    assert (float_part.name, packed.name) == ("float", "transformer")
    tensors = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        tensors.update(load_file(file))
    assert packed.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert packed.format_version == 2
    assert float_part.format_version is None
    assert float_part.packed_bits_per_weight is None


def test_bits_count_codes_and_scales_of_converted_weights(folder):
    packed = inspect_path(folder / "transformer")[0]
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    weights = bits = 0
    for module in model.modules():
        if hasattr(module, "spec"):
            weights += module.spec.weights
            bits += 8 * -(-module.spec.weights // 5) if module.spec.kind == "ternary" else 8 * module.spec.weights
            bits += 16 * module.scales.numel()
            bits += (
                8 * module.weight_multiplier.numel() if getattr(module, "weight_multiplier", None) is not None else 0
            )
    assert packed.packed_bits_per_weight == pytest.approx(bits / weights, rel=1e-12)


def test_rows_group_layers_of_one_kind(folder):
    packed = inspect_path(folder / "transformer")[0]
    rows = {row.name: row for row in packed.rows}
    assert rows["transformer_blocks.*.norm1.linear"].kind == "int8"
    assert rows["transformer_blocks.*.attn.to_q"].shape == (256, 256)
    assert rows["(kept)"].kind == "f32"
    assert sum(row.count for row in packed.rows if row.shape) == 20


def test_a_single_file(folder):
    (component,) = inspect_path(folder / "float" / "diffusion_pytorch_model.safetensors")
    assert component.name == "diffusion_pytorch_model.safetensors"
    assert component.bytes == 2 * component.bytes_16bit


def test_an_incomplete_checkpoint_is_an_error(folder, tmp_path):
    file = next((folder / "transformer").glob("*-00001-of-*.safetensors"))
    (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="is missing"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{garbage"])
def test_a_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        inspect_path(tmp_path)


def test_nothing_to_inspect(tmp_path):
    with pytest.raises(ValueError, match="no safetensors"):
        inspect_path(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_path(tmp_path / "nowhere")


def test_two_variants_in_one_folder_are_two_checkpoints(tmp_path):
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"a": torch.zeros(3)}, tmp_path / name)
    names = [component.name for component in inspect_path(tmp_path)]
    assert names == [f"{tmp_path.name} (model.fp16)", f"{tmp_path.name} (model)"]
