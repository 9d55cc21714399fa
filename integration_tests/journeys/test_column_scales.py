# SPDX-License-Identifier: Apache-2.0
"""Column scales through the whole house: layer, file, hosts, LoRA, exports, fused projections."""

import copy
import json
import pathlib

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import file_bytes, packed_layers
from diffusers_ternary.interop import export_gguf, export_mflux
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.layers import TernaryConv2d, TernaryLinear, concatenate_rows
from diffusers_ternary.ternarize import hadamard_matrix, ternarize
from integration_tests.support import denoisers
from integration_tests.support.column_scales import scale_columns, with_column_scale
from integration_tests.support.denoisers import predict


OPTIONS = [{}, {"hadamard": 16}, {"rank": 2}, {"hadamard": 16, "rank": 3}]


def packed_weight(columns: int = 40, **options):
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(7))
    return with_column_scale(ternarize(weight, group_size=16, **options))


def by_the_book(packed) -> torch.Tensor:
    """W R diag(c) + U V of FORMAT.md, in float64, from the stored tensors."""
    spec = packed.spec
    scales = packed.scale.double()
    if packed.multiplier is not None:
        scales = scales * packed.multiplier.double() / 63
    dense = packed.codes().double() * scales.repeat_interleave(spec.group_size, dim=1)[:, : spec.in_features]
    if spec.hadamard:
        rotation = torch.eye(spec.in_features, dtype=torch.float64)
        for start in range(0, spec.in_features - spec.in_features % spec.hadamard, spec.hadamard):
            block = slice(start, start + spec.hadamard)
            rotation[block, block] = hadamard_matrix(spec.hadamard, torch.float64, torch.device("cpu"))
        dense = dense @ rotation
    dense = dense @ packed.column_scale.double().diag()
    return dense if packed.low_rank is None else dense + packed.low_rank.up.double() @ packed.low_rank.down.double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_multiplies_by_what_the_format_says(options):
    packed = packed_weight(**options)
    expected = by_the_book(packed)
    torch.testing.assert_close(packed.dequantize().double(), expected, rtol=1e-6, atol=1e-6)
    layer = TernaryLinear.from_weight(packed, torch.ones(12), activation_dtype="none")
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ expected.T + 1, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, expected.sum(dim=0).expand(5, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.matrix(torch.float64, slice(3, 7)), expected[3:7], rtol=1e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        y = layer(x.detach().to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.detach() @ expected.T + 1, rtol=3e-2, atol=1e-1)
    assert "column_scales=True" in repr(layer)


@pytest.mark.parametrize("activation_dtype", ["auto", "int8", "float8_e4m3fn"])
def test_8_bit_activations_are_rounded_after_scaling(activation_dtype):
    packed = packed_weight()
    layer = TernaryLinear.from_weight(packed, activation_dtype=activation_dtype)
    plain = TernaryLinear(layer.spec, bias=False, device="meta", activation_dtype=activation_dtype)
    plain.install_weight(ternarize(torch.randn(12, 40, generator=torch.Generator().manual_seed(7)), group_size=16))
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), plain(x * packed.column_scale), rtol=1e-6, atol=1e-6)


def test_a_wrong_number_of_features_is_named():
    layer = TernaryLinear.from_weight(packed_weight())
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 40\], got \[5, 1\]"):
        layer(torch.randn(5, 1))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, kernel, padding=kernel // 2)
    packed = with_column_scale(ternarize(conv.weight.detach().flatten(1), group_size=8))
    layer = TernaryConv2d(packed.spec, conv, bias=False, device="meta", activation_dtype="none")
    layer.install_weight(packed)
    x = torch.randn(2, 8, 5, 6)
    expected = torch.nn.functional.conv2d(x.double(), by_the_book(packed).view_as(conv.weight), padding=kernel // 2)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[nn.Module, pathlib.Path]:
    model = denoisers.flux()
    quantize(model, TernaryConfig(group_size=16, hadamard=16, activation_dtype="none"))
    scale_columns(model)
    path = tmp_path_factory.mktemp("scaled")
    model.save_pretrained(path)
    return model, path


@pytest.fixture
def folder(saved) -> pathlib.Path:
    return saved[1]


def test_saved_and_loaded(saved):
    same, folder = saved
    model = FluxTransformer2DModel.from_pretrained(folder)
    layers = packed_layers(model)
    assert all(layer.spec.column_scales and layer.column_factors.dtype == torch.float16 for layer in layers.values())
    for name, layer in packed_layers(same).items():
        assert torch.equal(layer.dequantize(), layers[name].dequantize())
    assert torch.equal(predict(same), predict(model))
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(packed_layers(cast)[name].column_scale, layers[name].column_scale)


def test_the_file_is_of_version_3_and_others_stay_of_version_2(folder, tmp_path):
    (component,) = inspect_path(folder)
    assert component.format_version == 3
    layers = packed_layers(FluxTransformer2DModel.from_pretrained(folder))
    weights = sum(layer.spec.weights for layer in layers.values())
    assert component.packed_bits_per_weight == pytest.approx(
        8 * sum(file_bytes(layer.spec) for layer in layers.values()) / weights
    )
    model = denoisers.flux()
    quantize(model, TernaryConfig(group_size=16))
    model.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    with safe_open(file, framework="pt") as handle:
        assert json.loads(handle.metadata()["diffusers_ternary"])["format_version"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 2


def test_exports_name_the_layer(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot be exported to mflux: its inputs are.*without hadamard, column_scales"
    ):
        export_mflux(folder, tmp_path / "mflux")
    with pytest.raises(ValueError, match=r"No GGML type.*its inputs are.*column_scales"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_projections_with_different_factors_stay_apart():
    layers = {name: TernaryLinear.from_weight(packed_weight()) for name in ("to_q", "to_k")}
    joined = concatenate_rows(layers)
    x = torch.randn(3, 40)
    torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers.values()], dim=-1))
    scale_columns(nn.ModuleDict(layers))
    with pytest.raises(ValueError, match="to_q, to_k scale their common inputs by factors of their own"):
        concatenate_rows(layers)
