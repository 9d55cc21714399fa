# SPDX-License-Identifier: Apache-2.0
"""Who decides about a layer, in which order, and what people are told."""

import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import plan_conversion
from diffusers_ternary.backend.pack import PackingRecord, pack_layer
from diffusers_ternary.backend.placeholders import placeholder_for
from diffusers_ternary.backend.plan import layer_spec
from diffusers_ternary.backend.sizes import planned_bytes
from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.ternarize import ternarize
from integration_tests.support import denoisers


@pytest.fixture(scope="module")
def pixart():
    with torch.device("meta"):
        return denoisers.pixart()


def plan(model, **options):
    return plan_conversion(model, TernaryConfig(**options))


def test_overrides_come_before_everything(pixart):
    result = plan(
        pixart,
        overrides={"proj_out": "ternary", "blocks.0": "keep", "*.attn1.to_q": "int8", "*.ff.*": "keep"},
        modules_to_not_convert=["attn1", "proj_out"],
    )
    assert result.kinds["proj_out"] == "ternary"
    assert result.kinds["transformer_blocks.0.attn1.to_q"] == "int8"
    assert result.kept["transformer_blocks.0.attn1.to_k"] == "listed in modules_to_not_convert"
    assert result.kept["transformer_blocks.1.ff.net.2"] == "overrides['*.ff.*']"
    assert result.kinds["transformer_blocks.0.attn2.to_q"] == "ternary"


def test_the_first_matching_override_decides(pixart):
    one = plan(pixart, overrides={"*.attn1.to_q": "int8", "*.attn1.*": "keep"})
    other = plan(pixart, overrides={"*.attn1.*": "keep", "*.attn1.to_q": "int8"})
    assert one.kinds["transformer_blocks.0.attn1.to_q"] == "int8"
    assert "transformer_blocks.0.attn1.to_q" in other.kept


def test_every_layer_is_in_the_plan_once(pixart):
    result = plan(pixart, overrides={"*.attn2.*": "int8"})
    layers = {name for name, module in pixart.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert result.kinds.keys() | result.kept.keys() == layers
    assert not result.kinds.keys() & result.kept.keys()


def test_everything_can_be_ternary(pixart):
    result = plan(pixart, overrides={"*": "ternary"})
    assert result.kept == {}


def test_patterns_that_name_nothing_are_reported(pixart, caplog):
    with caplog.at_level(logging.WARNING, logger="diffusers_ternary"):
        plan(pixart, modules_to_not_convert=["attn9", "attn1"], overrides={"*.typo": "int8"})
    assert [record.message for record in caplog.records] == [
        "'*.typo' in the TernaryConfig names no linear layer or convolution of PixArtTransformer2DModel.",
        "'attn9' in the TernaryConfig names no linear layer or convolution of PixArtTransformer2DModel.",
    ]


def test_nothing_to_convert_is_an_error(pixart):
    with pytest.raises(ValueError, match=r"PixArtTransformer2DModel has no layer to convert \(\d+ linear .*'\*'"):
        plan(pixart, overrides={"*": "keep"})
    with pytest.raises(ValueError, match=r"Conv2d has no layer to convert \(0 linear"):
        plan(nn.Conv2d(3, 3, 3))


def test_float32_modules_of_the_class_are_kept():
    with torch.device("meta"):
        model = denoisers.wan()
    result = plan(model)
    assert result.kept["condition_embedder.time_embedder.linear_1"] == "kept in float32 by the model class"
    assert (
        plan(model, overrides={"*.time_embedder.*": "int8"}).kinds["condition_embedder.time_embedder.linear_1"]
        == "int8"
    )
    given = plan_conversion(model, TernaryConfig(), keep_in_fp32=["ffn"])
    assert given.kept["blocks.0.ffn.net.2"] == "kept in float32 by the model class"


def test_subclasses_of_linear_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"a": Scaled(8, 8), "b": nn.Linear(8, 8)})])})
    assert list(plan(model).kinds) == ["blocks.0.b"]


def test_layers_under_adapters_are_found_by_their_inner_name():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8)})])})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    assert "blocks.0.to_q.base_layer" in plan(model).kinds


def test_the_users_config_is_left_as_it_is(pixart):
    config = TernaryConfig(modules_to_not_convert=["attn1"], overrides={"*.attn2.*": "int8"})
    before = config.to_dict()
    plan_conversion(pixart, config)
    assert config.to_dict() == before


@pytest.mark.parametrize(("group_size", "expected"), [(128, 64), (16, 16), (None, 64), (65, 64)])
def test_specs(group_size, expected):
    module = nn.Linear(64, 32)
    scales = "double" if expected == 16 else "group"  # the smaller: 4 + 2 bytes a row against 4 * 2
    assert layer_spec("ternary", module, TernaryConfig(group_size=group_size)) == TernarySpec(32, 64, expected, scales)
    assert layer_spec("int8", module, TernaryConfig(group_size=group_size)) == Int8Spec(32, 64)


OPTIONS = [
    {},
    {"group_size": 16},
    {"group_size": 16, "scale_layout": "group"},
    {"scale_layout": "double", "rounding": "optimum"},
    {"hadamard": 32, "rank": 3},
    {"hadamard": 128, "rank": 64, "group_size": None},  # more than the matrix has
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("module", [nn.Linear(64, 24), nn.Conv2d(8, 24, 3)], ids=["linear", "conv"])
def test_a_layer_is_packed_as_it_was_planned(module, options):
    """The spec of the plan is the one that `ternarize` makes of the same options, codes and scales included."""
    config = TernaryConfig(**options)
    layer = placeholder_for(module, layer_spec("ternary", module, config), config)
    planned, nbytes = layer.spec, planned_bytes(layer, config)
    assert pack_layer(layer, module.weight.detach(), name="layer", config=config, record=PackingRecord())
    expected = ternarize(module.weight.detach().flatten(1), rounding=config.rounding, **config.spec_options)
    assert layer.spec == planned == expected.spec
    assert layer.stored_bytes() == nbytes
    assert torch.equal(layer.weight, expected.packed)
    assert torch.equal(layer.scales, expected.scale)
    assert torch.equal(layer.dequantize(), expected.dequantize().view(module.weight.shape))


def test_a_weight_that_does_not_fit_its_layer_is_refused():
    config = TernaryConfig()
    module = nn.Linear(64, 24)
    for kind, weight, message in (
        (
            "ternary",
            torch.randn(24, 32),
            r"blocks\.0: expected a float \[N, K\] weight of \[24, 64\], got .*\[24, 32\]",
        ),
        ("ternary", torch.randint(-9, 9, (24, 64)), r"blocks\.0: expected a float .* got torch\.int64"),
        ("int8", torch.randint(-9, 9, (24, 64)), r"blocks\.0: expected a float .* got torch\.int64"),
        ("int8", torch.randn(24, 32), "cannot be installed in the place"),
    ):
        layer = placeholder_for(module, layer_spec(kind, module, config), config)
        with pytest.raises(ValueError, match=message):
            pack_layer(layer, weight, name="blocks.0", config=config, record=PackingRecord())
        assert not layer.is_packed
