# SPDX-License-Identifier: Apache-2.0
"""The packed layers as modules: casts, copies, files, autocast, offloading."""

import copy
import io
import pickle

import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Linear, QuantizedLinear, TernaryLinear
from diffusers_ternary.ternarize import ternarize
from integration_tests.support import denoisers
from integration_tests.support.denoisers import predict


def linear(rows: int = 12, columns: int = 300, *, bias: bool = True, dtype: torch.dtype | None = None) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).to(dtype or torch.float32)


def ternary(source: nn.Linear, scales: str = "double", **options: object) -> TernaryLinear:
    return TernaryLinear.from_weight(ternarize(source.weight.detach(), scales=scales), source.bias, **options)


def int8(source: nn.Linear, **options: object) -> Int8Linear:
    layer = Int8Linear(Int8Spec(*source.weight.shape), source.bias is not None, device="meta", **options)
    layer.pack(source.weight.detach())
    if source.bias is not None:
        layer.bias = nn.Parameter(source.bias.detach(), requires_grad=False)
    return layer


MAKERS = {
    "ternary group": lambda source, **options: ternary(source, "group", **options),
    "ternary double": ternary,
    "int8": int8,
}
each_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def packed_bytes(module: nn.Module) -> dict[str, bytes]:
    """The bytes of every packed tensor, which no cast may change."""
    return {
        f"{name}.{suffix}": bytes(getattr(layer, suffix).detach().cpu().contiguous().view(torch.uint8).flatten())
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear)
        for suffix in layer.packed_names
        if getattr(layer, suffix) is not None
    }


def inputs(columns: int = 300, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


class TestForward:
    @each_layer
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_a_linear_layer_with_the_dequantized_weight(self, make, bias):
        layer = make(linear(bias=bias))
        assert isinstance(layer, nn.Linear)
        torch.testing.assert_close(layer(inputs()), layer.to_float()(inputs()), rtol=1e-5, atol=1e-5)

    @each_layer
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_returns_the_dtype_of_the_input(self, make, dtype):
        layer = make(linear(dtype=dtype))
        y = layer(inputs(dtype=dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y, layer.to_float(dtype)(inputs(dtype=dtype)), rtol=2e-2, atol=2e-2)

    @each_layer
    def test_compute_dtype_is_that_of_the_product(self, make):
        layer = make(linear(), compute_dtype=torch.bfloat16)
        y = layer(inputs())
        assert y.dtype == torch.float32
        assert torch.equal(y, layer(inputs(dtype=torch.bfloat16)).float())
        assert layer.dequantize().dtype == torch.bfloat16

    @each_layer
    @pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("compute_dtype", [None, torch.float32])
    def test_autocast_gives_the_dtype_that_a_float_layer_gives(self, make, autocast_dtype, compute_dtype):
        source = linear()
        layer = make(source, compute_dtype=compute_dtype)
        with torch.autocast("cpu", dtype=autocast_dtype):
            y, expected = layer(inputs()), source(inputs())
            same = layer.to_float(torch.float32)(inputs())
        assert y.dtype == expected.dtype == autocast_dtype
        torch.testing.assert_close(y, same, rtol=2e-2, atol=2e-2)

    @each_layer
    def test_autocast_leaves_float64_alone_like_a_float_layer(self, make):
        source = linear().double()
        layer = make(source)
        x = inputs().double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == source(x).dtype

    @each_layer
    def test_gradients_reach_the_input_only(self, make):
        layer = make(linear())
        x = inputs().requires_grad_()
        layer(x).square().sum().backward()
        reference = inputs().requires_grad_()
        layer.to_float()(reference).square().sum().backward()
        torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in layer.parameters())

    @each_layer
    def test_wrong_features_are_a_readable_error(self, make):
        with pytest.raises((ValueError, RuntimeError), match=r"300.*5, 7|5x7 and 300x12"):
            make(linear())(torch.zeros(5, 7))

    @each_layer
    def test_compiles_into_one_graph(self, make):
        layer = make(linear())
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs()), layer(inputs()))


class TestTensors:
    @each_layer
    @pytest.mark.parametrize("cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16()])
    def test_casts_leave_packed_tensors_alone(self, make, cast):
        model = nn.Sequential(nn.LayerNorm(300), make(linear()))
        before, dense = packed_bytes(model), model[1].dequantize(torch.float32)
        cast(model)
        assert packed_bytes(model) == before
        assert torch.equal(model[1].dequantize(torch.float32), dense)
        assert model[1].bias.dtype == model[0].weight.dtype != torch.float32

    @each_layer
    def test_casts_to_float32_and_back_lose_nothing(self, make):
        model = make(linear())
        before = packed_bytes(model)
        assert packed_bytes(model.double().half().float()) == before

    @each_layer
    def test_parameters_are_frozen_integers(self, make):
        layer = make(linear(bias=False))
        assert set(dict(layer.named_parameters())) == set(layer.spec.memory_tensors())
        for parameter in layer.parameters():
            assert not parameter.is_floating_point()
            assert not parameter.requires_grad
        # int8, not uint8: T5 casts its activations to weight.dtype unless that is int8.
        assert layer.weight.dtype == torch.int8

    @each_layer
    def test_state_dict_round_trip(self, make):
        source = make(linear())
        target = make(linear().requires_grad_(False).apply(lambda m: nn.init.normal_(m.weight)))
        assert packed_bytes(source) != packed_bytes(target)
        target.load_state_dict(source.state_dict())
        assert torch.equal(source(inputs()), target(inputs()))

    @each_layer
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_are_equal_and_independent(self, make, how):
        layer = make(linear(), compute_dtype=torch.bfloat16)
        if how == "deepcopy":
            copied = copy.deepcopy(layer)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert type(copied) is type(layer)
        assert copied.spec == layer.spec
        assert packed_bytes(copied) == packed_bytes(layer)
        assert torch.equal(copied(inputs()), layer(inputs()))
        copied.weight.data.zero_()
        assert layer.weight.any()


class TestDequantize:
    @each_layer
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_to_float(self, make, dtype):
        layer = make(linear())
        dense = layer.to_float(dtype)
        assert type(dense) is nn.Linear
        assert dense.weight.dtype == dense.bias.dtype == dtype
        assert torch.equal(dense.weight, layer.dequantize(dtype))
        assert (dense.in_features, dense.out_features) == (300, 12)

    def test_ternary_is_what_ternarize_says(self):
        packed = ternarize(linear().weight.detach())
        assert torch.equal(TernaryLinear.from_weight(packed).dequantize(), packed.dequantize())

    @each_layer
    def test_scales_are_a_view_and_match_the_stored_ones(self, make):
        layer = make(linear())
        assert layer.scales.dtype in (torch.float16, torch.bfloat16)
        assert layer.scales.data_ptr() == layer.weight_scale.data_ptr()


class TestPlaceholder:
    def test_holds_a_float_weight_until_it_is_packed(self):
        layer = TernaryLinear(TernarySpec(12, 300, 128), dtype=torch.bfloat16)
        assert not layer.is_packed
        assert layer.weight.shape == (12, 300)
        assert layer.weight.dtype == torch.bfloat16
        assert "empty" in repr(layer)
        with pytest.raises(RuntimeError, match="TernaryLinear holds no packed weight yet"):
            _ = layer.scales
        layer.pack(linear().weight.detach())
        assert layer.is_packed

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"weight_multiplier": None}, "Expected the tensors"),
            ({"weight": torch.zeros(12, 75, dtype=torch.uint8)}, r"weight of a .* must be .*int8.* \[12, 75\], got"),
            ({"weight": torch.zeros(12, 300, dtype=torch.int8)}, r"got torch\.int8 \[12, 300\]"),
            ({"weight_scale": torch.zeros(12, 3)}, r"weight_scale of a .*\[12, 1\], got"),
            ({"weight_scale": torch.zeros(12, 1, dtype=torch.int16)}, r"weight_scale .* got torch\.int16"),
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(self, change, message):
        packed = ternarize(linear().weight.detach(), scales="double")
        tensors = {"weight": packed.packed, "weight_scale": packed.scale, "weight_multiplier": packed.multiplier}
        layer = TernaryLinear(packed.spec, device="meta")
        given = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            layer.install(packed.spec, given)
        assert not layer.is_packed

    @pytest.mark.parametrize("shape", [(12, 256), (24, 300)])
    def test_a_weight_of_another_shape_is_refused(self, shape):
        layer = TernaryLinear(TernarySpec(12, 300, 128), device="meta")
        with pytest.raises(ValueError, match=r"A TernarySpec\(.* cannot be installed in the place of a .*=12.*=300"):
            layer.install_weight(ternarize(torch.ones(shape)))
        assert not layer.is_packed


class TestRepr:
    def test_ternary(self):
        text = repr(ternary(linear(12, 300), "double"))
        # 75 bytes of planes, 3 multipliers and a 2-byte scale per row of 300: 8 * 80 / 300 bits.
        for part in ("in_features=300", "out_features=12", "bias=True", "group_size=128", "scales=double"):
            assert part in text
        assert "2.133 bits/weight" in text
        assert "kernel=" in text

    def test_int8(self):
        text = repr(int8(linear(12, 300, bias=False)))
        assert "Int8Linear(in_features=300, out_features=12, bias=False, 8.053 bits/weight" in text


class TestHostHooks:
    """Hooks of diffusers that move or cast parameters."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return quantize(denoisers.pixart().eval(), TernaryConfig(overrides={"*.attn1.to_q": "int8"}))

    def test_layerwise_casting_keeps_packed_weights(self, model):
        before, expected = packed_bytes(model), predict(model, torch.float32)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert packed_bytes(model) == before
        storage = {parameter.dtype for parameter in model.parameters()}
        assert torch.float8_e4m3fn in storage, "the hook must have done something"
        outputs = predict(model, torch.float32)
        assert packed_bytes(model) == before
        # Kept layers and biases went through float8; packed weights did not.
        assert torch.nn.functional.cosine_similarity(outputs.flatten(), expected.flatten(), dim=0) > 0.98

    def test_layerwise_casting_of_packed_layers_alone_changes_biases_only(self, model):
        layer = model.transformer_blocks[0].attn1.to_k
        expected = layer(inputs(64)) - layer.bias
        apply_layerwise_casting(layer, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        outputs = layer(inputs(64))
        torch.testing.assert_close(outputs - layer.bias.float(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
    @pytest.mark.parametrize("to_disk", [False, True])
    def test_group_offload_leaves_outputs_equal(self, model, offload_type, to_disk, tmp_path):
        before, expected = packed_bytes(model), predict(model, torch.float32)
        apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
            offload_to_disk_path=str(tmp_path) if to_disk else None,
        )
        # Not bit-equal: float32 sums depend on the alignment of the tensors read back, in float models as well.
        torch.testing.assert_close(predict(model, torch.float32), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predict(model, torch.float32), expected, rtol=1e-5, atol=1e-5)
        assert to_disk or packed_bytes(model) == before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_model_dtype_is_that_of_the_kept_layers(self, dtype):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(300, 300, bias=False)
                self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(300, 300, bias=False), nn.LayerNorm(300))])

        model = quantize(Model().to(dtype), TernaryConfig(overrides={"first": "ternary"}))
        assert isinstance(model.first, TernaryLinear)
        floating = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
        assert set(floating) == {dtype}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("int8", lambda: torch.nn.Linear(16, 8)),
        ("ternary", lambda: torch.nn.Linear(16, 8)),
        ("int8", lambda: torch.nn.Conv2d(4, 8, 3)),
        ("ternary", lambda: torch.nn.Conv2d(4, 8, 3)),
    ],
)
def test_float_weights_are_never_loaded_over_codes(kind, build, strict, assign):
    """An int8 weight has the float one's shape: torch would copy, and so truncate, the values."""
    torch.manual_seed(0)
    config = TernaryConfig(group_size=16, overrides={"*": kind})
    model = quantize(torch.nn.Sequential(build()), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.nn.Sequential(build()).state_dict()
    for given in (state, {"0.weight_scale": before["0.weight_scale"].to(torch.int64)}):
        with pytest.raises(RuntimeError, match=r"0\.weight\S* is torch\.\w+ .*the layer is packed"):
            model.load_state_dict(given, strict=strict, assign=assign)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other = quantize(torch.nn.Sequential(build()), config)
    other.load_state_dict(model.state_dict(), strict=strict, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
