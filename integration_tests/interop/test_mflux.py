# SPDX-License-Identifier: Apache-2.0
"""mflux: names against its own modules, packed words written by hand, and MLX's dequantizer where it is installed."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.interop import export_gguf, export_mflux
from diffusers_ternary.interop.mflux_import import dequantize_affine
from diffusers_ternary.interop.mflux_names import CLASSES, mflux_module
from diffusers_ternary.interop.mlx_affine import encode_affine
from integration_tests.support import denoisers
from integration_tests.support.command_line import run_command


NAMES = json.loads((Path(__file__).parents[1] / "support" / "mflux_names.json").read_text())


def packed(folder: Path, make: Any = denoisers.flux, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    model = quantize(make().to(dtype), TernaryConfig(**options))
    model.save_pretrained(folder)
    model.dequantize()
    return model


def test_words_are_those_of_mlx() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, :3] = torch.tensor([-1, 0, 1])
    encoded = encode_affine(codes, torch.full((1, 1), 0.5), 2)
    assert [f"{word:08x}" for word in encoded.weight.numpy().view(np.uint32)[0]] == ["55555564", "55555555"]
    assert (encoded.scales.tolist(), encoded.biases.tolist()) == ([[0.5]], [[-0.5]])
    bytes_ = encode_affine(torch.tensor([[-127, 0, 1, 127] * 8], dtype=torch.int8), torch.full((1, 1), 0.25), 8)
    assert f"{bytes_.weight.numpy().view(np.uint32)[0, 0]:08x}" == "ff818001"
    assert bytes_.biases.tolist() == [[-32.0]]


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.5, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32)]
)
def test_scales_are_stored_in_the_narrowest_dtype_that_holds_them(scale, dtype) -> None:
    encoded = encode_affine(torch.ones(2, 32, dtype=torch.int8), torch.tensor([[1.0], [scale]]), 2)
    assert encoded.scales.dtype == encoded.biases.dtype == dtype
    assert encoded.scales.float()[1].item() == scale


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_against_the_dequantizer_of_mlx(bits, group) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'mlx[cpu]'")
    generator = torch.Generator().manual_seed(bits * group)
    limit = 1 if bits == 2 else 127
    codes = torch.randint(-limit, limit + 1, (8, 256), generator=generator, dtype=torch.int8)
    scales = torch.rand(8, 256 // group, generator=generator)
    encoded = encode_affine(codes, scales, bits)
    parts = [mx.array(encoded.weight.numpy().view(np.uint32))]
    parts += [mx.array(part.float().numpy()) for part in (encoded.scales, encoded.biases)]
    theirs = np.array(mx.dequantize(*parts, group_size=group, bits=bits))
    exact = codes.float() * scales.repeat_interleave(group, dim=1)
    assert (
        np.array_equal(theirs, exact.numpy())
        if bits == 2
        else np.allclose(theirs, exact.numpy(), rtol=1e-5, atol=2e-5)
    )


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_name_is_one_of_mflux(class_name) -> None:
    """`mflux_names.json`: parameters of mflux 0.24's modules, block numbers replaced by N."""
    options = {"guidance_embeds": True} if class_name == "FluxTransformer2DModel" else {}
    if class_name == "Flux2Transformer2DModel":
        options = {"guidance_embeds": False, "num_layers": 2, "num_single_layers": 2}
    if class_name == "Flux3Transformer2DModel":
        options = {"flow_map": True}
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**options)
    ours = set()
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        renamed = f"{mflux_module(class_name, module)}.{leaf}" if module else leaf
        ours.add(re.sub(r"(?<=\.)\d+(?=\.)", "N", renamed, count=1))
    assert ours == set(NAMES[class_name])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (denoisers.flux, {"group_size": 128}),
        (denoisers.flux, {"group_size": 32, "scale_layout": "group"}),
        (denoisers.flux, {"group_size": None}),
        (denoisers.qwen_image, {"group_size": 64, "overrides": {"*_mod.1": "int8"}}),
    ],
)
def test_files_hold_the_weights_of_the_packed_model(tmp_path, make, options) -> None:
    model = packed(tmp_path / "in", make, dtype=torch.float32, **options)
    report = export_mflux(tmp_path / "in", tmp_path / "out")
    state = model.state_dict()
    assert (report.differing, report.weights) == (0, sum(value.numel() for value in state.values()))
    stored = load_file(tmp_path / "out" / "0.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(stored, "0.safetensors")
    with safe_open(tmp_path / "out" / "0.safetensors", framework="pt") as file:
        assert file.metadata() == index["metadata"] == {"quantization_level": "2", "mflux_version": "0.24.0"}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = {"2-bit": 0, "8-bit": 0, "float": 0}
    for name, exact in state.items():
        module, _, leaf = name.rpartition(".")
        module = mflux_module(type(model).__name__, module)
        weight = stored[f"{module}.{leaf}"]
        scales = stored.get(f"{module}.scales")
        if leaf != "weight" or scales is None:
            kinds["float"] += 1
            assert torch.equal(weight.float(), exact.float())
            continue
        bits = weight.shape[1] * 32 // exact.shape[1]  # as mflux infers it
        assert (bits, exact.shape[1] // scales.shape[1]) in {(2, 128), (2, 64), (2, 32), (8, 128), (8, 64), (8, 32)}
        kinds[f"{bits}-bit"] += 1
        back = dequantize_affine(weight, scales, stored[f"{module}.biases"], bits=bits)
        assert np.array_equal(back, exact.numpy())
    assert report.types == {kind: count for kind, count in kinds.items() if count}
    assert kinds["2-bit"] > 5
    assert (kinds["8-bit"] > 0) == ("overrides" in options)


def test_portable_scales_need_no_rounding_anywhere(tmp_path) -> None:
    """float16 in GGUF, bfloat16 in mflux, whose dtype it is; the default's scales are rounded in the one, float32 in \
    the other."""
    errors = []
    for layout, differs in (("portable", False), ("auto", True)):
        torch.manual_seed(0)
        dense = denoisers.flux()
        weight = dense.transformer_blocks[0].ff.net[0].proj.weight.detach().clone()
        model = quantize(dense, TernaryConfig(group_size=64, scale_layout=layout))
        model.save_pretrained(tmp_path / layout)
        model.dequantize()
        errors.append(float((model.transformer_blocks[0].ff.net[0].proj.weight.detach() - weight).norm()))
        assert bool(export_gguf(tmp_path / layout, tmp_path / f"{layout}.gguf").differing) == differs
        assert export_mflux(tmp_path / layout, tmp_path / f"{layout}-mflux").differing == 0
        stored = load_file(tmp_path / f"{layout}-mflux" / "0.safetensors")
        dtype = stored["transformer_blocks.0.ff.linear1.scales"].dtype
        assert dtype == (torch.float32 if differs else torch.bfloat16)
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)  # what ternary rounding costs, whatever the scales


def test_shards_and_the_rest_of_a_pipeline(tmp_path) -> None:
    (tmp_path / "in" / "vae").mkdir(parents=True)
    (tmp_path / "in" / "vae" / "config.json").write_text("{}")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "in" / "model_index.json").write_text(json.dumps(index))
    packed(tmp_path / "in" / "transformer", group_size=128)
    report = export_mflux(tmp_path / "in", tmp_path / "out", max_shard_size=20_000)
    folder = tmp_path / "out" / "transformer"
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(weight_map.values())
    assert not list(folder.glob("diffusion_pytorch_model*"))
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == index
    assert report.bytes == sum(file.stat().st_size for file in files)
    assert convert(tmp_path / "in", tmp_path / "out", to="mflux", overwrite=True).differing == 0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (denoisers.flux, {"hadamard": 64}, "its inputs are rotated. Calibrate or quantize without hadamard"),
        (denoisers.flux, {"rank": 2}, "it has a low-rank correction"),
        (denoisers.flux, {"group_size": 48}, "MLX knows groups of 32, 64 and 128"),
        (denoisers.z_image, {}, r"w2 cannot be exported to mflux: its 170 input features are not .* \(--merge\)\.$"),
        (denoisers.sana, {}, "SanaTransformer2DModel has no mflux form"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, make, options, message) -> None:
    packed(tmp_path / "in", make, **options)
    with pytest.raises(ValueError, match=message):
        export_mflux(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_merged_layers_are_bfloat16(tmp_path, caplog) -> None:
    packed(tmp_path / "in", group_size=64, hadamard=64)
    done = run_command("convert", tmp_path / "in", tmp_path / "out", "--to", "mflux", "--merge", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert 0 < report["largest_difference"] <= 2**-8
    assert "2-bit" not in report["types"]
    stored = load_file(tmp_path / "out" / "0.safetensors")
    assert "transformer_blocks.0.attn.to_q.scales" not in stored
    assert stored["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
    assert f"{len(report['inexact'])} layers are stored as bfloat16; {report['differing']:,} of" in caplog.text


def test_one_verb_for_all_formats(tmp_path) -> None:
    packed(tmp_path / "in", group_size=128)
    for options, message in (
        ({"to": "onnx"}, "to='onnx' is not one of packed, gguf, mflux"),
        ({"to": "mflux", "runtime": "comfyui"}, "An export to mflux has no runtime"),
        ({"to": "mflux", "variant": "fp16"}, "variant belong to packing a model"),
        ({"runtime": "comfyui"}, "runtime belong to an export"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "in", tmp_path / "out", **options)
    done = run_command("convert", tmp_path / "in", tmp_path / "out", "--to", "mflux")
    assert done.exit_code == 0, done.output
    assert "0 of " in done.output
    assert "weights differ from the packed model" in " ".join(done.output.split())
    done = run_command("convert", tmp_path / "in", tmp_path / "model.gguf", "--for", "sdcpp-gpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["types"]["q2_0"] > 0


def test_an_8_bit_layer_of_zeros(tmp_path) -> None:
    """As models begin them that modulate by a zero: its biases are those of a 2-bit layer."""

    def zeroed() -> Any:
        model = denoisers.flux()
        model.transformer_blocks[0].norm1.linear.weight.data.zero_()
        return model

    packed(tmp_path / "in", zeroed, overrides={"*.norm1.linear": "int8"})
    report = export_mflux(tmp_path / "in", tmp_path / "out")
    assert report.types["8-bit"] >= 1
    assert report.differing == 0


@pytest.mark.parametrize(
    ("make", "options", "dtype"),
    [
        (denoisers.flux, {"group_size": 128}, torch.bfloat16),
        (denoisers.flux, {"group_size": None}, torch.float32),
        (denoisers.qwen_image, {"group_size": 64, "scales": "group"}, torch.float32),
    ],
)
def test_and_back_bit_equal(tmp_path, make, options, dtype) -> None:
    model = packed(tmp_path / "in", make, dtype=dtype, **options)
    export_mflux(tmp_path / "in", tmp_path / "mflux", max_shard_size=200_000)
    (report,) = convert(tmp_path / "mflux", tmp_path / "back")
    assert (report.format, report.verified) == ("mflux", True)
    back = type(model).from_pretrained(tmp_path / "back", dtype=dtype)
    assert len(packed_layers(back)) == len(report.layers) > 5
    back.dequantize()
    state = back.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_incomplete_mflux_folder_is_refused(tmp_path) -> None:
    packed(tmp_path / "in", group_size=128)
    export_mflux(tmp_path / "in", tmp_path / "mflux", max_shard_size=200_000)
    (tmp_path / "mflux" / "0.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert(tmp_path / "mflux", tmp_path / "back")
    assert not (tmp_path / "back").exists()
