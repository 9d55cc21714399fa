# SPDX-License-Identifier: Apache-2.0
"""Lossless recovery of ternary weights that were dequantized: on tensors, and through every way of quantizing."""

import logging

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import TernaryFit, TernaryWeight, find_group_size, recover, ternary_fit
from integration_tests.support import denoisers, text_encoders


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ternary_weight(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, *, seed: int = 0, density: float = 0.6
) -> torch.Tensor:
    """A dense weight that was ternary, written without this package: one scale per group, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, columns, group_size):
        stop = min(start + group_size, columns)
        scale = (torch.rand(rows, 1, generator=generator) + 0.05).to(dtype)
        signs = torch.randint(0, 2, (rows, stop - start), generator=generator) * 2 - 1
        signs[torch.rand(rows, stop - start, generator=generator) > density] = 0
        weight[:, start:stop] = signs.to(dtype) * scale
    return weight


class TestTensors:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("columns", "group_size"),
        [
            (256, 32),
            (256, 64),
            (512, 128),
            (512, 256),
            (700, 35),
            (700, 140),
            (560, 80),
            (300, 128),
            (96, 96),
            (20, 20),
        ],
    )
    def test_every_group_size_and_dtype_is_found_and_exact(self, columns, group_size, dtype):
        weight = ternary_weight(24, columns, group_size, dtype)
        packed = recover(weight)
        assert packed.spec.group_size == group_size
        assert torch.equal(packed.dequantize(dtype), weight)

    @pytest.mark.parametrize("seed", range(8))
    def test_sparse_codes(self, seed):
        # Few nonzeros leave the place of the boundaries open: any size that fits is as good.
        weight = ternary_weight(40, 480, 48, torch.bfloat16, seed=seed, density=0.04)
        packed = recover(weight)
        assert packed.spec.group_size >= 48
        assert torch.equal(packed.dequantize(torch.bfloat16), weight)

    def test_what_the_sample_of_rows_does_not_show(self):
        weight = torch.zeros(4000, 256, dtype=torch.float16)
        weight[:, ::2] = 0.5
        weight[1234] = ternary_weight(1, 256, 32, torch.float16)[0]
        packed = recover(weight)
        assert packed.spec.group_size == 32
        assert torch.equal(packed.dequantize(torch.float16), weight)

    def test_one_scale_per_tensor(self):
        weight = torch.randint(-1, 2, (16, 300)).bfloat16() * torch.tensor(0.3, dtype=torch.bfloat16)
        assert recover(weight).spec.group_size == 300

    def test_scales_keep_the_dtype_of_the_file(self):
        for dtype in (torch.bfloat16, torch.float16):
            assert recover(ternary_weight(8, 128, 64, dtype)).scale.dtype == dtype
        # float32 files were widened most of the time; where they were not, nothing may be lost.
        widened = ternary_weight(8, 128, 64, torch.bfloat16).float()
        assert recover(widened).scale.dtype in (torch.float16, torch.bfloat16)
        assert recover(ternary_weight(8, 128, 64, torch.float32)).scale.dtype == torch.float32

    @pytest.mark.parametrize("value", [6e-8, 1e-5, 60000.0])
    def test_extreme_scales(self, value):
        weight = torch.tensor([[value, 0.0, -value, value] * 16], dtype=torch.float16)
        assert torch.equal(recover(weight).dequantize(torch.float16), weight)

    def test_negative_zeros_and_rows_of_zeros(self):
        weight = ternary_weight(8, 128, 32, torch.bfloat16)
        weight[3] = 0
        weight[weight == 0] = -0.0
        packed = recover(weight)
        assert torch.equal(packed.dequantize(torch.bfloat16), weight)
        assert torch.equal(packed.scale[3].float(), torch.zeros(4))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ordinary_weights_are_not_ternary(self, dtype):
        torch.manual_seed(0)
        weight = torch.randn(64, 512).to(dtype)
        assert recover(weight) is None
        assert ternary_fit(weight).fraction < 0.01

    @pytest.mark.parametrize("levels", [[-2.0, -1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    def test_more_levels_are_not_ternary(self, levels):
        torch.manual_seed(0)
        weight = torch.tensor(levels)[torch.randint(len(levels), (32, 256))].half()
        assert recover(weight) is None

    def test_one_wrong_weight_is_enough(self):
        weight = ternary_weight(4000, 256, 64, torch.bfloat16)
        weight[777, 200] += 0.25
        assert find_group_size(weight) is None
        fit = recover(weight)
        assert isinstance(fit, TernaryFit)
        assert fit == ternary_fit(weight)
        assert fit.group_size == 64
        assert fit.fraction == pytest.approx(1 - 1 / 16000)
        assert fit.almost
        assert str(fit) == "99.99 % of the groups of 64 are ternary"

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_nan_and_inf_are_not_ternary(self, bad):
        weight = ternary_weight(4000, 256, 64, torch.bfloat16)
        weight[777, 200] = bad
        assert find_group_size(weight) is None
        assert not isinstance(recover(weight), TernaryWeight)
        assert ternary_fit(weight).fraction < 1

    def test_a_damaged_row_of_the_sample_does_not_hide_the_others(self):
        weight = ternary_weight(4000, 256, 64, torch.bfloat16)
        torch.manual_seed(0)
        weight[0] = torch.randn(256).bfloat16()  # the first row is looked at first
        assert recover(weight) == TernaryFit(64, 1 - 4 / 16000)

    def test_other_dtypes_and_shapes_are_left_alone(self):
        assert recover(torch.ones(4, 4, 1, 1)) is None
        assert recover(torch.ones(64, 64, dtype=torch.int8)) is None
        assert recover(torch.ones(64, 64, dtype=torch.float64)) is None


def ternary_flux(dtype: torch.dtype, *, damage: bool = False) -> FluxTransformer2DModel:
    """A Flux whose block layers hold ternary weights of different group sizes."""
    torch.manual_seed(0)
    model = denoisers.flux().to(dtype)
    for index, (name, module) in enumerate(model.named_modules()):
        if type(module) is nn.Linear and "transformer_blocks" in name:
            size = (32, 64, 128, module.in_features)[index % 4]
            module.weight.data = ternary_weight(module.out_features, module.in_features, size, dtype, seed=index)
    if damage:
        model.transformer_blocks[0].attn.to_q.weight.data[3, 5] += 0.25
    return model


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


class TestModels:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rounding", ["twn", "recover"])
    def test_from_pretrained_notices(self, tmp_path, caplog, dtype, rounding):
        source = ternary_flux(dtype)
        source.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            model = FluxTransformer2DModel.from_pretrained(
                tmp_path, quantization_config=TernaryConfig(rounding=rounding), dtype=dtype
            )
        weights = {name: module.weight for name, module in source.named_modules() if type(module) is nn.Linear}
        layers = packed_layers(model)
        assert layers
        for name, layer in layers.items():
            assert torch.equal(layer.dequantize(dtype), weights[name])
        (line,) = lines(caplog, "ternary already")
        assert f"the weights of {len(layers)} layers are ternary already" in line

    def test_hadamard_and_low_rank_do_not_apply_to_ternary_weights(self, tmp_path):
        source = ternary_flux(torch.bfloat16)
        source.save_pretrained(tmp_path)
        config = TernaryConfig(hadamard=64, rank=4)
        model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
        layer = model.transformer_blocks[0].attn.to_q
        assert (layer.spec.hadamard, layer.spec.rank) == (0, 0)
        assert torch.equal(layer.dequantize(torch.bfloat16), source.transformer_blocks[0].attn.to_q.weight)

    def test_ordinary_models_cause_no_notice(self, tmp_path, caplog):
        denoisers.flux().save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())
        assert not lines(caplog, "ternary already")
        assert not lines(caplog, "almost")

    def test_recover_keeps_what_is_not_ternary(self, tmp_path, caplog):
        source = ternary_flux(torch.bfloat16, damage=True)
        source.save_pretrained(tmp_path / "source")
        with caplog.at_level(logging.WARNING):
            model = FluxTransformer2DModel.from_pretrained(
                tmp_path / "source", quantization_config=TernaryConfig(rounding="recover"), dtype=torch.bfloat16
            )
        kept = model.transformer_blocks[0].attn.to_q
        assert type(kept) is nn.Linear
        assert torch.equal(kept.weight, source.transformer_blocks[0].attn.to_q.weight)
        assert torch.equal(kept.bias, source.transformer_blocks[0].attn.to_q.bias)
        assert type(model.transformer_blocks[0].attn.to_k) is TernaryLinear
        (line,) = lines(caplog, "almost ternary")
        assert "attn.to_q" in line
        assert "kept" in line
        model.save_pretrained(tmp_path / "packed")
        again = FluxTransformer2DModel.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_a_rounding_rule_rounds_what_is_almost_ternary_and_says_so(self, tmp_path, caplog):
        ternary_flux(torch.bfloat16, damage=True).save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())
        assert type(model.transformer_blocks[0].attn.to_q) is TernaryLinear
        (line,) = lines(caplog, "almost ternary")
        assert "rounded" in line

    def test_recover_refuses_an_ordinary_model(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"no layer whose weights are ternary .* never rounds"):
            FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig(rounding="recover"))

    @pytest.mark.parametrize("rounding", ["twn", "recover"])
    def test_text_encoders(self, tmp_path, caplog, rounding):
        torch.manual_seed(0)
        source = text_encoders.t5(64).bfloat16()
        layers = {name: module for name, module in source.named_modules() if type(module) is nn.Linear}
        for seed, module in enumerate(layers.values()):
            rows, columns = module.weight.shape
            module.weight.data = ternary_weight(rows, columns, 32, torch.bfloat16, seed=seed)
        other = source.encoder.block[0].layer[0].SelfAttention.q
        other.weight.data.normal_()
        source.save_pretrained(tmp_path / "in")
        config = TernaryConfig(rounding=rounding)
        with caplog.at_level(logging.WARNING):
            model = type(source).from_pretrained(tmp_path / "in", quantization_config=config, dtype=torch.bfloat16)
        packed = packed_layers(model)
        assert len(packed) == len(layers) - (rounding == "recover")
        assert lines(caplog, f"the weights of {len(layers) - 1} layers are ternary already")
        for name, layer in packed.items():
            if layers[name] is not other:
                assert torch.equal(layer.dequantize(torch.bfloat16), layers[name].weight)
        if rounding == "recover":
            assert torch.equal(model.encoder.block[0].layer[0].SelfAttention.q.weight, other.weight)
        model.save_pretrained(tmp_path / "out")
        again = type(source).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(again(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)

    def test_convolutions(self, caplog):
        model = denoisers.sana()
        conv = model.transformer_blocks[0].ff.conv_point
        conv.weight.data = ternary_weight(*conv.weight.shape[:2], 32, torch.float32)[..., None, None]
        dense = conv.weight.detach().clone()
        with caplog.at_level(logging.WARNING):
            quantize(model)
        packed = model.transformer_blocks[0].ff.conv_point
        assert torch.equal(packed.dequantize(), dense)
        assert lines(caplog, "of 1 layers are ternary already")

    def test_in_memory(self, caplog):
        model = ternary_flux(torch.float32, damage=True)
        before = {name: module.weight.clone() for name, module in model.named_modules() if type(module) is nn.Linear}
        with caplog.at_level(logging.WARNING):
            quantize(model, TernaryConfig(rounding="recover"))
        layers = packed_layers(model)
        assert len(layers) == 19
        assert all(torch.equal(layer.dequantize(), before[name]) for name, layer in layers.items())
        assert type(model.transformer_blocks[0].attn.to_q) is nn.Linear
        assert lines(caplog, "of 19 layers are ternary already")

    def test_in_memory_refuses_an_ordinary_model_untouched(self):
        model = denoisers.flux()
        with pytest.raises(ValueError, match="no layer whose weights are ternary"):
            quantize(model, TernaryConfig(rounding="recover"))
        assert not packed_layers(model)
