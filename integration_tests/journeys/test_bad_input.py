# SPDX-License-Identifier: Apache-2.0
"""Damaged, incomplete and mismatched checkpoints: an error that names file, tensor and remedy, and no model.

Every case runs through both loaders: diffusers with a Flux transformer, transformers with a CLIP text encoder.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusers_ternary import TernaryConfig, quantize
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.checkpoints import edit_json, flip_bit, read_file, rewrite


REMEDY = "download it again, or write it again with diffusers-ternary"


@dataclasses.dataclass(frozen=True)
class Host:
    """A loader and a small model for it.

    Args:
        model_class (`type`): has `from_pretrained`.
        file (`str`): name of its weights file.
        layer (`str`): a ternary layer with `double` scales.
        plain (`str`): a tensor that is not packed.
    """

    model_class: type
    file: str
    layer: str
    plain: str

    def build(self) -> Any:
        torch.manual_seed(0)
        model = denoisers.flux() if self.model_class is FluxTransformer2DModel else text_encoders.clip()
        return quantize(model, TernaryConfig(group_size=8, scale_layout="double"))

    def load(self, folder: Path) -> Any:
        return self.model_class.from_pretrained(folder)


HOSTS = {
    "diffusers": Host(
        FluxTransformer2DModel,
        "diffusion_pytorch_model.safetensors",
        "transformer_blocks.0.attn.to_q",
        "x_embedder.weight",
    ),
    "transformers": Host(
        CLIPTextModel,
        "model.safetensors",
        "encoder.layers.0.self_attn.q_proj",
        "final_layer_norm.weight",
    ),
}


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.fixture(scope="module")
def pristine(host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    host.build().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "packed"))


def refuse(host: Host, folder: Path, *parts: str, error: type[Exception] = ValueError) -> None:
    """Loading raises, and the message holds all `parts`."""
    with pytest.raises(error) as caught:
        host.load(folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in the message: {message}"


def test_the_pristine_folder_loads(host, pristine):
    tensors, metadata = read_file(pristine / host.file)
    assert host.layer in json.loads(metadata["diffusers_ternary"])["layers"]
    assert f"{host.layer}.weight_multiplier" in tensors
    assert host.plain in tensors
    host.load(pristine)


class TestDamagedBytes:
    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, host, folder, keep):
        file = folder / host.file
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
        # diffusers opens an unsharded file before any hook of a quantizer runs, and raises OSError.
        if host.model_class is FluxTransformer2DModel:
            refuse(host, folder, str(file), error=OSError)
        else:
            refuse(host, folder, host.file, "cannot be read as safetensors", REMEDY)

    def test_truncated_shard(self, host, tmp_path):
        host.build().save_pretrained(tmp_path, max_shard_size="40KB")
        shards = sorted(tmp_path.glob("*-of-*.safetensors"))
        assert len(shards) > 1
        shard = shards[-1]
        shard.write_bytes(shard.read_bytes()[:-10])
        refuse(host, tmp_path, shard.name, "cannot be read as safetensors", REMEDY)

    @pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_multiplier"])
    def test_flipped_bit_in_a_packed_tensor(self, host, folder, suffix):
        flip_bit(folder / host.file, f"{host.layer}.{suffix}")
        refuse(host, folder, host.file, f"checksum of {host.layer}.{suffix} does not match", REMEDY)

    def test_flipped_bit_in_a_bias(self, host, folder):
        flip_bit(folder / host.file, f"{host.layer}.bias")
        refuse(host, folder, host.file, f"checksum of {host.layer}.bias does not match", REMEDY)

    def test_flipped_bit_in_a_tensor_that_is_not_packed(self, host, folder):
        flip_bit(folder / host.file, host.plain)
        refuse(host, folder, host.file, f"checksum of {host.plain} does not match", REMEDY)


class TestDamagedTensors:
    """The checksums fit, so that the check behind them must notice."""

    @pytest.mark.parametrize("byte", [243, 255])
    def test_code_byte(self, host, folder, byte):
        def change(tensors, body):
            tensors[f"{host.layer}.weight"][7] = byte

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, host.file, f"{host.layer}.weight", f"Code byte {byte} at offset 7", "download")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
    def test_scale_value(self, host, folder, bad):
        def change(tensors, body):
            tensors[f"{host.layer}.weight_scale"][1] = bad

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, host.file, f"{host.layer}.weight_scale holds NaN, Inf or negative scales", REMEDY)

    def test_multiplier_value(self, host, folder):
        def change(tensors, body):
            tensors[f"{host.layer}.weight_multiplier"][1, 1] = 64

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, host.file, f"{host.layer}.weight_multiplier holds 64; multipliers are 0..63", REMEDY)

    @pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_multiplier"])
    def test_missing(self, host, folder, suffix):
        def change(tensors, body):
            del tensors[f"{host.layer}.{suffix}"]

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, str(folder), f"{host.layer}.{suffix}", "missing", REMEDY)

    @pytest.mark.parametrize("shard_size", ["40KB", "10GB"])
    @pytest.mark.parametrize("kept", [False, True])
    def test_missing_tensors_that_are_not_packed(self, host, tmp_path, shard_size, kept):
        """A bias or a norm that no file has would stay uninitialized; the host only warns, or says nothing."""
        host.build().save_pretrained(tmp_path, max_shard_size=shard_size)
        name = host.plain if kept else f"{host.layer}.bias"
        for file in tmp_path.glob("*.safetensors"):
            rewrite(file, lambda tensors, _: tensors.pop(name, None), checksums=False)
        for index in tmp_path.glob("*.index.json"):
            weight_map = json.loads(index.read_text())["weight_map"]
            edit_json(index, weight_map={key: file for key, file in weight_map.items() if key != name})
        refuse(host, tmp_path, str(tmp_path), f"the tensor {name} is missing", REMEDY)

    @pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_multiplier"])
    def test_wrong_shape(self, host, folder, suffix):
        def change(tensors, body):
            tensors[f"{host.layer}.{suffix}"] = tensors[f"{host.layer}.{suffix}"][:-1].clone()

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, host.file, f"{host.layer}.{suffix} is", "a ternary layer of", REMEDY)

    @pytest.mark.parametrize(("suffix", "dtype"), [("weight", torch.int8), ("weight_scale", torch.float64)])
    def test_wrong_dtype(self, host, folder, suffix, dtype):
        def change(tensors, body):
            tensors[f"{host.layer}.{suffix}"] = tensors[f"{host.layer}.{suffix}"].to(dtype)

        rewrite(folder / host.file, change, checksums=True)
        refuse(host, folder, host.file, f"{host.layer}.{suffix} is", "a ternary layer of", REMEDY)

    def test_missing_shard(self, host, tmp_path):
        host.build().save_pretrained(tmp_path, max_shard_size="40KB")
        shard = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises((ValueError, OSError)) as caught:
            host.load(tmp_path)
        assert shard.name in str(caught.value) or "missing" in str(caught.value)

    def test_a_shard_of_another_save(self, host, tmp_path):
        host.build().save_pretrained(tmp_path / "a", max_shard_size="40KB")
        shards = sorted((tmp_path / "a").glob("*-of-*.safetensors"))

        def change(tensors, body):
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    tensors[name] = tensor + 1

        # The layout that every shard carries holds all checksums: one shard cannot vouch for itself.
        rewrite(shards[-1], change, checksums=False)
        refuse(host, tmp_path / "a", shards[-1].name, "checksum of", REMEDY)


class TestVersionsAndConfigs:
    def test_newer_version_in_the_metadata(self, host, folder):
        def change(tensors, body):
            body["format_version"] = 4

        rewrite(folder / host.file, change, checksums=False)
        refuse(host, folder, host.file, "format_version=4 is newer than 3", "pip install -U diffusers-ternary")

    def test_newer_version_in_config_json(self, host, folder):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={**config, "format_version": 4, "new_field": 1})
        refuse(host, folder, "config.json: format_version=4 is newer", "pip install -U diffusers-ternary")

    def test_malformed_metadata(self, host, folder):
        def change(tensors, body):
            body["layers"][host.layer]["group_size"] = 0

        rewrite(folder / host.file, change, checksums=False)
        refuse(host, folder, host.file, "metadata is malformed", "group_size=0")

    def test_unknown_field_in_config_json(self, host, folder):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={**config, "group_sizes": 64})
        refuse(host, folder, "does not know group_sizes. Did you mean group_size?", error=TypeError)

    def test_packed_weights_without_their_config(self, host, folder):
        edit_json(folder / "config.json", quantization_config=None)
        # Without a quantization_config no quantizer is made, so the host raises: the packed shape does not fit.
        if host.model_class is FluxTransformer2DModel:
            refuse(host, folder, "transformer_blocks.0", "expected shape")
        else:
            refuse(host, folder, "mismatched", error=RuntimeError)

    def test_packed_weights_without_their_config_quantized_again(self, host, folder):
        edit_json(folder / "config.json", quantization_config=None)
        with pytest.raises(ValueError, match=r"holds packed weights, but its config\.json has no quantization_config"):
            host.model_class.from_pretrained(folder, quantization_config=TernaryConfig())

    def test_config_without_packed_weights(self, host, folder):
        model = host.load(folder)
        model.dequantize()
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / host.file, {"format": "pt"})
        refuse(host, folder, str(folder), "declares diffusers_ternary, but the weights", "delete quantization_config")

    def test_config_of_another_size(self, host, folder):
        name = "num_attention_heads" if host.model_class is FluxTransformer2DModel else "hidden_size"
        value = 4 if host.model_class is FluxTransformer2DModel else 64
        edit_json(folder / "config.json", **{name: value})
        refuse(host, folder, " is packed as", "config.json does not fit the weights")

    def test_stripped_metadata(self, host, folder):
        tensors = load_file(folder / host.file)
        (folder / host.file).unlink()
        save_file(tensors, folder / host.file, {"format": "pt"})
        refuse(host, folder, "are not packed", "delete quantization_config")


def test_weights_of_another_architecture(tmp_path):
    HOSTS["diffusers"].build().save_pretrained(tmp_path / "flux")
    torch.manual_seed(0)
    quantize(denoisers.sd3(), TernaryConfig()).save_pretrained(tmp_path / "sd3")
    name = HOSTS["diffusers"].file
    shutil.copy(tmp_path / "flux" / name, tmp_path / "sd3" / name)
    with pytest.raises(ValueError, match=r"sd3.*packed.* SD3Transformer2DModel .*config\.json"):
        SD3Transformer2DModel.from_pretrained(tmp_path / "sd3")


class TestOnTheFly:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_in_a_float_checkpoint(self, host, tmp_path, bad):
        model = host.build()
        model.dequantize()
        model.get_submodule(host.layer).weight.data[3, 3] = bad
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{host.layer}: the weight holds 1 NaN or Inf"):
            host.model_class.from_pretrained(tmp_path, quantization_config=TernaryConfig())

    def test_a_layer_missing_from_a_float_checkpoint(self, host, tmp_path):
        model = host.build()
        model.dequantize()
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / host.file)
        del tensors[f"{host.layer}.weight"]
        (tmp_path / host.file).unlink()
        save_file(tensors, tmp_path / host.file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"checkpoint has no (tensor|weight).*{host.layer}"):
            host.model_class.from_pretrained(tmp_path, quantization_config=TernaryConfig())

    def test_disk_offload_is_refused(self, host, tmp_path):
        model = host.build()
        model.dequantize()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="device_map puts layers on disk while quantizing on the fly"):
            host.model_class.from_pretrained(
                tmp_path, quantization_config=TernaryConfig(), device_map={"": "disk"}, offload_folder=tmp_path / "o"
            )


class TestFailedSaves:
    """A save that fails leaves nothing that looks like a complete model."""

    @staticmethod
    def weights_in(folder: Path) -> list[str]:
        return [file.name for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pt")]

    def test_adapters(self, tmp_path):
        from peft import LoraConfig

        host = HOSTS["diffusers"]
        model = host.build()
        model.add_adapter(LoraConfig(r=2, target_modules=[host.layer.rpartition(".")[2]]))
        with pytest.raises(ValueError, match=r"carries adapter layers.*save_lora_weights"):
            model.save_pretrained(tmp_path)
        assert self.weights_in(tmp_path) == []

    def test_of_a_transformers_model_its_own_adapter_is_saved(self, tmp_path):
        """transformers writes the adapter alone, in PEFT's layout, which loads into the packed model again."""
        from peft import LoraConfig

        host = HOSTS["transformers"]
        model = host.build()
        model.add_adapter(LoraConfig(r=2, target_modules=[host.layer.rpartition(".")[2]], init_lora_weights=False))
        model.save_pretrained(tmp_path)
        assert self.weights_in(tmp_path) == ["adapter_model.safetensors"]
        again = host.build()
        again.load_adapter(str(tmp_path))
        saved, loaded = ({n: p for n, p in m.named_parameters() if ".lora_" in n} for m in (model, again))
        assert saved
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())

    def test_pickle_files(self, tmp_path):
        with pytest.raises(ValueError, match="safetensors only: leave safe_serialization=True"):
            HOSTS["diffusers"].build().save_pretrained(tmp_path, safe_serialization=False)
        assert self.weights_in(tmp_path) == []

    def test_a_packed_layer_that_was_replaced_is_saved_as_it_is_now(self, host, tmp_path):
        model = host.build()
        layer = model.get_submodule(host.layer)
        model.set_submodule(host.layer, layer.to_float())
        model.save_pretrained(tmp_path)
        reloaded = host.load(tmp_path)
        assert torch.equal(reloaded.get_submodule(host.layer).weight, model.get_submodule(host.layer).weight)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_quantize_in_memory_changes_nothing_when_it_fails(self, host, bad):
        model = host.build()
        model.dequantize()
        layers = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        model.get_submodule(host.layer).weight.data[0, 0] = bad
        with pytest.raises(ValueError, match=rf"{host.layer}: the weight holds 1 NaN or Inf"):
            quantize(model)
        assert {name for name, m in model.named_modules() if type(m) is torch.nn.Linear} == layers
        assert getattr(model, "hf_quantizer", None) is None or not model.hf_quantizer.once


@pytest.fixture(autouse=True)
def quiet_loggers(caplog):
    caplog.set_level(logging.ERROR)
