# SPDX-License-Identifier: Apache-2.0
"""Unpacked checkpoints, as stock diffusers and transformers save them, to packed folders and back, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.interop.inspection import inspect_path
from integration_tests.support import denoisers, foreign, text_encoders


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_ternary(model: nn.Module, dtype: torch.dtype, *, pattern: str = "block") -> int:
    """Overwrites the layers in the blocks by ternary weights of several group sizes; returns their number."""
    count = 0
    for name, module in model.named_modules():
        if type(module) is nn.Linear and pattern in name:
            columns = module.in_features
            size = min((32, 48, 64, columns)[count % 4], columns)
            weight = foreign.random_ternary(module.out_features, columns, size, seed=count)
            module.weight.data = torch.from_numpy(weight.dense()).to(dtype)
            count += 1
    return count


def assert_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class TestModels:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("make", [denoisers.flux, denoisers.sana], ids=lambda make: make.__name__)
    def test_bit_equal_after_loading(self, tmp_path, make, dtype):
        torch.manual_seed(0)
        model = make().to(dtype)
        count = make_ternary(model, dtype)
        model.save_pretrained(tmp_path / "in", max_shard_size="500KB")
        (report,) = convert(tmp_path / "in", tmp_path / "out", max_shard_size=200_000)
        assert len(report.layers) == count
        assert report.verified
        again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
        assert len(packed_layers(again)) == count
        again.dequantize()
        assert_equal_tensors(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scales", ["group", "double"])
    def test_what_this_package_dequantized(self, tmp_path, scales, dtype):
        torch.manual_seed(0)
        model = quantize(denoisers.flux().to(dtype), TernaryConfig(group_size=32, scale_layout=scales))
        count = len(packed_layers(model))
        model.dequantize()
        model.save_pretrained(tmp_path / "in")
        (report,) = convert(tmp_path / "in", tmp_path / "out")
        assert len(report.layers) == count
        again = FluxTransformer2DModel.from_pretrained(tmp_path / "out", dtype=dtype)
        again.dequantize()
        assert_equal_tensors(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize("make", [text_encoders.t5, text_encoders.qwen3], ids=lambda make: make.__name__)
    def test_a_text_encoder(self, tmp_path, make):
        model = make().bfloat16()
        count = make_ternary(model, torch.bfloat16, pattern=".")
        model.save_pretrained(tmp_path / "in")
        (report,) = convert(tmp_path / "in", tmp_path / "out")
        assert len(report.layers) == count
        again = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        weights = {name: model.get_parameter(f"{name}.weight") for name in report.layers}
        for name, layer in packed_layers(again).items():
            assert torch.equal(layer.dequantize(torch.bfloat16), weights[name])

    def test_kept_tensors_keep_their_dtype_and_bits(self, tmp_path):
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        file = tmp_path / "in" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["x_embedder.weight"] = torch.randn(tensors["x_embedder.weight"].shape)
        tensors["norm_out.linear.bias"] = torch.full_like(tensors["norm_out.linear.bias"], -0.0)
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
        convert(tmp_path / "in", tmp_path / "out")
        written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
        assert written["x_embedder.weight"].dtype == torch.float32
        assert torch.equal(written["x_embedder.weight"], tensors["x_embedder.weight"])
        assert bool(torch.signbit(written["norm_out.linear.bias"]).all())

    def test_scales_that_no_16_bits_hold(self, tmp_path):
        model = denoisers.flux()
        model.transformer_blocks[0].attn.to_q.weight.data = torch.where(torch.randn(256, 256) > 0, 0.1, 0.0)
        model.save_pretrained(tmp_path / "in")
        convert(tmp_path / "in", tmp_path / "out")
        again = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
        layer = again.transformer_blocks[0].attn.to_q
        assert layer.scale_dtype == torch.float32
        assert torch.equal(layer.dequantize(), model.transformer_blocks[0].attn.to_q.weight)
        (component,) = inspect_path(tmp_path / "out")
        row = next(row for row in component.rows if row.shape)
        assert row.bytes == -(-256 * 256 // 5) + 4 * 256

    def test_the_config_of_the_source_survives(self, tmp_path):
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        (tmp_path / "in" / "LICENSE.md").write_text("text")
        file = tmp_path / "in" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "added_by_a_trainer": 1}))
        convert(tmp_path / "in", tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config.pop("quantization_config")["rounding"] == "recover"
        assert config == json.loads(file.read_text())
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "LICENSE.md",
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]

    def test_a_variant(self, tmp_path):
        model = denoisers.flux().half()
        make_ternary(model, torch.float16)
        model.save_pretrained(tmp_path / "in", variant="fp16", max_shard_size="500KB")
        with pytest.raises(ValueError, match="Choose a --variant"):
            convert(tmp_path / "in", tmp_path / "out")
        assert convert(tmp_path / "in", tmp_path / "out", variant="fp16")[0].layers


class TestReports:
    def damaged(self, folder: Path) -> ModelMixin:
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.transformer_blocks[0].attn.to_q.weight.data[3, 5] += 0.5
        model.save_pretrained(folder)
        return model

    def test_almost_ternary_is_reported_and_kept(self, tmp_path, caplog):
        model = self.damaged(tmp_path / "in")
        (report,) = convert(tmp_path / "in", tmp_path / "out")
        (name,) = report.almost
        assert name == "transformer_blocks.0.attn.to_q"
        assert 0.99 < report.almost[name].fraction < 1
        assert name in caplog.text
        assert f"{name} is almost ternary" in report.summary()
        again = FluxTransformer2DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert type(again.get_submodule(name)) is nn.Linear
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
        assert json.loads(json.dumps(report.to_dict()))["misfits"][name]["fraction"] < 1

    def test_ordinary_layers_are_reported(self, tmp_path):
        self.damaged(tmp_path / "in")
        (report,) = convert(tmp_path / "in", tmp_path / "out")
        outside = {name for name in report.misfits if "block" not in name}
        assert "x_embedder" in outside
        assert not outside & report.almost.keys()

    def test_inspect_recognizes_unpacked_models(self, tmp_path):
        self.damaged(tmp_path / "ternary")
        denoisers.flux().save_pretrained(tmp_path / "float")
        formats = {component.name: component.format for component in inspect_path(tmp_path)}
        assert formats == {"ternary": "holds ternary values", "float": None}


class TestBadInput:
    def refused(self, tmp_path: Path, match: str, error: type[Exception] = ValueError, **options) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=match):
            convert(tmp_path / "in", tmp_path / "out", **options)
        assert sorted(tmp_path.rglob("*")) == before

    def test_no_ternary_layer(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in")
        self.refused(tmp_path, r"no ternary layer \(30 looked at\).*convert never rounds")

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path, "does not exist", FileNotFoundError)

    def test_not_a_model(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "notes.txt").write_text("text")
        self.refused(tmp_path, "neither model_index.json")

    def test_a_file_of_another_kind(self, tmp_path):
        (tmp_path / "in").write_text("text")
        self.refused(tmp_path, "in no format that is read here")

    def test_pickled_weights(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in", safe_serialization=False)
        self.refused(tmp_path, "no safetensors files at all")

    def test_another_architecture(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in")
        denoisers.sd3().save_config(tmp_path / "in")
        self.refused(tmp_path, r"is not a SD3Transformer2DModel: \d+ tensors \(.*\) missing")

    def test_tensors_that_the_model_does_not_use_are_no_reason(self, tmp_path, caplog):
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        file = tmp_path / "in" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        file.unlink()
        save_file({**tensors, "training.step": torch.zeros(1)}, file, {"format": "pt"})
        convert(tmp_path / "in", tmp_path / "out")
        assert "training.step" in caplog.text
        assert "training.step" in load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")

    def test_another_size(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in")
        file = tmp_path / "in" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 8}))
        self.refused(tmp_path, "config belongs to another model")

    def test_a_missing_shard(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in", max_shard_size="2MB")
        next((tmp_path / "in").glob("*-00002-of-*")).unlink()
        self.refused(tmp_path, "which is missing")

    def test_a_truncated_file(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in")
        file = tmp_path / "in" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        self.refused(tmp_path, "cannot be read as safetensors")

    def test_a_short_name_is_named_too(self, tmp_path):
        """ "in" is part of many sentences."""
        from diffusers_ternary.interop.open_foreign import named_errors

        with pytest.raises(ValueError, match=rf"^{tmp_path}/in: nothing in it"), named_errors(tmp_path / "in"):
            raise ValueError("nothing in it")

    @pytest.mark.parametrize("beside", [None, "SCB"])
    def test_codes_of_another_method(self, tmp_path, beside):
        """A layer that is not ternary is kept as it is stored, which would make weights of LLM.int8()'s codes."""
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        file = tmp_path / "in" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        layer = "transformer_blocks.0.norm1.linear"
        tensors[f"{layer}.weight"] = torch.ones_like(tensors[f"{layer}.weight"], dtype=torch.int8)
        if beside is not None:
            tensors[f"{layer}.{beside}"] = torch.ones(len(tensors[f"{layer}.weight"]))
        save_file(tensors, file, metadata={"format": "pt"})
        self.refused(tmp_path, rf"in(:| holds) .*{layer}.*load the original checkpoint")

    def test_packed_already(self, tmp_path):
        quantize(denoisers.flux()).save_pretrained(tmp_path / "in")
        self.refused(tmp_path, "is packed already")

    def test_a_pipeline_without_such_a_component(self, tmp_path):
        (tmp_path / "in").mkdir()
        index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
        (tmp_path / "in" / "model_index.json").write_text(json.dumps(index))
        self.refused(tmp_path, "no component that denoises. Choose from vae")

    def test_the_destination_exists(self, tmp_path):
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("text")
        self.refused(tmp_path, "exists already", FileExistsError)
        with pytest.raises(FileExistsError, match=r"holds mine\.txt"):
            convert(tmp_path / "in", tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "mine.txt").read_text() == "text"

    def test_an_earlier_result_is_replaced(self, tmp_path):
        model = denoisers.flux().bfloat16()
        make_ternary(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "in")
        denoisers.pixart().save_pretrained(tmp_path / "out")
        self.refused(tmp_path, "exists already", FileExistsError)
        convert(tmp_path / "in", tmp_path / "out", overwrite=True)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == type(model).__name__
