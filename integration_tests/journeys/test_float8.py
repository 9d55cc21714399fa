# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 8-bit floats with scales: every way in quantizes the values that they stand for, or refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.backend.float8 import find_float8_scales, headers_of
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.checkpoints import to_original_z_image


CONFIG = TernaryConfig(group_size=16)
FORCED = TernaryConfig(group_size=16, overrides={"*": "ternary"})
Tensors = dict[str, torch.Tensor]


def per_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale as stored, and repeated to the weight's shape."""
    scale = weight.abs().max() / 448
    return scale.reshape(()), scale.expand(weight.shape)


def per_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-9) / 448
    return scale, scale.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)


def per_row_2d(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale, full = per_row(weight)
    return scale[:, None], full


def encode(
    tensors: Tensors, *, scale_name: str, scale_of: Callable, beside: Tensors, whole: Tensors
) -> tuple[Tensors, Tensors]:
    """A state dict in 8-bit floats, and the float32 values that it stands for."""
    stored, values = dict(whole), {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or "embed" in name or not name.endswith(".weight"):
            stored[name] = values[name] = tensor
            continue
        scale, full = scale_of(tensor.float())
        stored[name] = (tensor.float() / full).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + scale_name] = scale
        values[name] = stored[name].float() * full
        stored |= {name.removesuffix("weight") + part: value.clone() for part, value in beside.items()}
    return stored, values


COMFY = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
KINDS = {
    "ComfyUI, old": {
        "scale_name": "scale_weight",
        "scale_of": lambda w: tuple(s.reshape(1) if s.dim() == 0 else s for s in per_tensor(w)),
        "beside": {"scale_input": torch.ones(1)},
        "whole": {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)},
    },
    "ComfyUI": {
        "scale_name": "weight_scale",
        "scale_of": per_tensor,
        "beside": {"input_scale": torch.tensor(0.5), "comfy_quant": COMFY},
        "whole": {},
    },
    "per row": {"scale_name": "weight_scale", "scale_of": per_row, "beside": {}, "whole": {}},
    "compressed-tensors": {"scale_name": "weight_scale", "scale_of": per_row_2d, "beside": {}, "whole": {}},
}


def check(model: nn.Module, values: Tensors) -> None:
    """The model is the quantized float model of these values, to the bit, packed layers and kept ones."""
    assert packed_layers(model)
    reference = quantize_values(model, values)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[name]), name


def quantize_values(model: nn.Module, values: Tensors) -> Tensors:
    twin = type(model).from_config({**model.config, "quantization_config": None})
    twin.load_state_dict({name: value.float() for name, value in values.items()})
    return quantize(twin, CONFIG).state_dict()


DENOISERS = {
    FluxTransformer2DModel: denoisers.flux,
    SD3Transformer2DModel: denoisers.sd3,
    SanaTransformer2DModel: denoisers.sana,  # with convolutions
}


@pytest.mark.parametrize(
    ("model_class", "kind", "sharded"),
    [
        (FluxTransformer2DModel, "ComfyUI, old", False),
        (FluxTransformer2DModel, "ComfyUI", True),
        (SD3Transformer2DModel, "per row", True),
        (SD3Transformer2DModel, "compressed-tensors", False),
        (SanaTransformer2DModel, "per row", False),
    ],
)
def test_denoisers(model_class, kind, sharded, tmp_path, caplog):
    torch.manual_seed(0)
    DENOISERS[model_class]().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stored, values = encode(load_file(file), **KINDS[kind])
    file.unlink()
    if sharded:
        save_sharded(stored, tmp_path)
    else:
        save_file(stored, file, {"format": "pt"})
    model = model_class.from_pretrained(tmp_path, quantization_config=CONFIG)
    check(model, values)
    assert "not used" not in caplog.text


def save_sharded(tensors: Tensors, folder: Path) -> None:
    """In two files, weights in one and what belongs to them in the other."""
    parts = ({}, {})
    for name, tensor in tensors.items():
        parts[name.endswith("weight")][name] = tensor
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize(("kind", "build"), [("ComfyUI, old", text_encoders.clip), ("per row", text_encoders.t5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoders(kind, build, dtype, tmp_path):
    torch.manual_seed(0)
    float_model = build()
    float_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored, values = encode(load_file(file), **KINDS[kind])
    file.unlink()
    save_file(stored, file, {"format": "pt"})
    kept = next(name for name, module in float_model.named_modules() if type(module) is nn.Linear)
    config = TernaryConfig(group_size=16, modules_to_not_convert=[kept])
    model = type(float_model).from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
    layers = packed_layers(model)
    assert kept not in layers
    prefix = next(name for name in values if name.endswith(f"{kept}.weight")).removesuffix(f"{kept}.weight")
    assert torch.equal(model.get_submodule(kept).weight, values[f"{prefix}{kept}.weight"].to(dtype))
    for name, layer in layers.items():
        packed = quantize(nn.Sequential(linear(values[f"{prefix}{name}.weight"])), FORCED)[0]
        assert torch.equal(layer.dequantize(torch.float32), packed.dequantize(torch.float32)), name


def linear(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return module


def test_single_files(tmp_path):
    """In the original layout, whose projections are split while loading: the scales have to come before that."""
    torch.manual_seed(0)
    denoisers.z_image().save_pretrained(tmp_path)
    original = to_original_z_image(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    stored, values = encode(original, **KINDS["ComfyUI"])
    models = []
    for name, tensors in (("float8", stored), ("float32", values)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        models.append(
            ZImageTransformer2DModel.from_single_file(
                str(tmp_path / f"{name}.safetensors"), config=str(tmp_path), quantization_config=CONFIG
            )
        )
    assert packed_layers(models[0])
    expected = models[1].state_dict()
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_convert(tmp_path):
    """A ternary model in 8-bit floats: codes and scales are found in the values."""
    torch.manual_seed(0)
    model = denoisers.flux()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data = torch.randint(-1, 2, module.weight.shape).float() * torch.rand(1)
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "diffusion_pytorch_model.safetensors"
    stored, values = encode(load_file(file), **KINDS["per row"])
    file.unlink()
    save_file(stored, file)
    (report,) = convert(tmp_path / "float", tmp_path / "packed")
    # Rows of four weights are not evidence.
    assert report.layers.keys() == {n.removesuffix(".weight") for n in values if values[n].dim() == 2} - {"x_embedder"}
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "packed")
    for name, layer in packed_layers(loaded).items():
        assert torch.equal(layer.dequantize(torch.float32), values[f"{name}.weight"]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_scale_2": torch.ones(())}, "x.weight_scale_2 beside it"),
        ({"x.weight_zero_point": torch.ones(())}, "x.weight_zero_point beside it"),
        (
            {"x.weight_scale": torch.ones(4, 3)},
            r"x.weight_scale is \[4, 3\], which does not divide",
        ),
        ({"x.weight_scale": torch.full((8,), float("nan"))}, "x.weight_scale holds NaN"),
        ({"x.weight_scale": -torch.ones(8)}, "x.weight_scale holds NaN, Inf or negative"),
        ({"x.weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, r"with the scale x.weight_scale \(U8\)"),
        ({"x.weight_scale": torch.ones(8), "x.scale_weight": torch.ones(8)}, "x.weight has two scales"),
        ({"x.weight": torch.ones(8, 20), "x.weight_scale": torch.ones(8)}, "x.weight is F32 with the scale"),
        ({"y.weight_scale": torch.ones(8)}, "y.weight_scale is the scale of a weight that is not there"),
        ({"x.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "x.comfy_quant says"),
        ({"x.comfy_quant": torch.tensor(list(b"[" * 9999), dtype=torch.uint8)}, "nested too deeply"),
    ],
)
def test_what_is_not_understood_is_refused(change, message):
    tensors = {"x.weight": torch.ones(8, 20).to(torch.float8_e4m3fn), **change}
    with pytest.raises(ValueError, match=f"the file.*{message}.*Load the float checkpoint"):
        find_float8_scales(headers_of(tensors), tensors.__getitem__, source="the file")


@pytest.mark.parametrize(
    ("name", "scale", "block"),
    [
        ("weight_scale_inv", (3, 2), (128, 128)),  # DeepSeek's blocks: the last of 300 rows has 44
        ("weight_scale", (3, 2), (128, 128)),
        ("weight_scale", (3, 4), (100, 50)),
        ("scale_weight", (300, 5, 1), (1, 40)),
        ("weight_scale", (300, 1), (1, 200)),
        ("weight_scale", (1, 1), (300, 200)),
    ],
)
def test_blocks(name, scale, block):
    stored = torch.randn(300, 200).to(torch.float8_e4m3fn)
    table = torch.rand(scale) + 0.5
    tensors = {"x.weight": stored, f"x.{name}": table}
    found = find_float8_scales(headers_of(tensors), tensors.__getitem__, source="the file")
    table = table.reshape(scale[:2])
    rows, columns = torch.arange(300) // block[0], torch.arange(200) // block[1]
    assert torch.equal(found.weight("x.weight", stored), stored.float() * table[rows][:, columns])
    assert found.extras == {f"x.{name}"}


def test_floats_without_scales_are_what_they_are(tmp_path):
    torch.manual_seed(0)
    denoisers.flux().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for name, t in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    check(FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG), tensors)
