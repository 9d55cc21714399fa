# SPDX-License-Identifier: Apache-2.0
"""`ternarize`: layouts, dtypes, bad values, and the bound on its float32 copies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ternary.format import TernarySpec, scale_layout
from diffusers_ternary.ternarize import ROUNDINGS, ternarize, weight


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dense(packed: weight.TernaryWeight) -> torch.Tensor:
    """Independent of the package's own dequantization: code times the scale of its group, in float64."""
    spec, codes = packed.spec, packed.codes().double()
    result = torch.empty_like(codes)
    for n in range(spec.out_features):
        for k in range(spec.in_features):
            if packed.multiplier is None:
                scale = packed.scale[n, k // spec.group_size].double()
            else:
                scale = packed.scale[n, 0].double() * packed.multiplier[n, k // spec.group_size].double() / 63
            result[n, k] = codes[n, k] * scale
    return result


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("layout", ["group", "double"])
@pytest.mark.parametrize(("columns", "group_size"), [(13, 4), (12, 4), (13, None), (13, 100), (13, 1), (1, 128)])
def test_dequantize_is_code_times_scale(columns, group_size, layout, rounding):
    packed = ternarize(matrix(5, columns), group_size=group_size, scales=layout, rounding=rounding)
    assert packed.spec == TernarySpec(5, columns, min(group_size or columns, columns), layout)
    for name, tensor in {"weight": packed.packed, "weight_scale": packed.scale}.items():
        expected = packed.spec.memory_tensors()[name]
        assert tensor.dtype in expected.dtypes
        assert tuple(tensor.shape) == expected.shape
    assert (packed.multiplier is not None) == (layout == "double")
    torch.testing.assert_close(packed.dequantize().double(), dense(packed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_group_scales_are_those_of_the_rule(seed):
    values = matrix(8, 300, seed)
    packed = ternarize(values, group_size=128, scales="group")
    for start in (0, 128, 256):
        part = values[:, start : start + 128]
        kept = part.abs() > 0.75 * part.abs().mean(dim=1, keepdim=True)
        assert torch.equal(packed.codes()[:, start : start + 128], (part.sign() * kept).to(torch.int8))
        scale = (part.abs() * kept).sum(dim=1) / kept.sum(dim=1)
        torch.testing.assert_close(packed.scale[:, start // 128].float(), scale, rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_input_dtypes_give_what_their_float32_values_give(dtype, rounding):
    values = matrix(6, 260).to(dtype)
    got = ternarize(values, rounding=rounding)
    expected = ternarize(values.float(), rounding=rounding)
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(got.scale, expected.scale)


def test_sums_over_long_rows_are_not_taken_in_16_bits():
    values = torch.full((1, 15360), 0.01, dtype=torch.bfloat16)
    values[0, ::2] = -0.01
    packed = ternarize(values, group_size=None)
    assert packed.scale.item() == pytest.approx(float(values.abs().max()), rel=2**-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_refused_with_the_layers_name(bad, dtype, monkeypatch):
    values = matrix(5, 13).to(dtype)
    values[4, 12] = bad
    monkeypatch.setattr(weight, "_CHUNK_WEIGHTS", 13)  # row by row: the bad one is in the last slice
    with pytest.raises(ValueError, match=r"blocks\.3\.to_q: .*1 NaN or Inf.*modules_to_not_convert"):
        ternarize(values, name="blocks.3.to_q")


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int8)])
def test_only_float_matrices_are_ternarized(values):
    with pytest.raises(ValueError, match=r"to_q: expected a float \[N, K\] weight, got"):
        ternarize(values, name="to_q")


def test_zero_weights_give_zero():
    values = matrix(4, 256)
    values[1] = 0
    values[2, :128] = 0
    for layout in ("group", "double"):
        restored = ternarize(values, scales=layout).dequantize()
        assert not restored[1].any()
        assert not restored[2, :128].any()
        assert restored[2, 128:].any()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("layout", ["group", "double"])
def test_any_magnitude_is_stored_within_16_bits_of_precision(scale, layout):
    restored = ternarize(torch.full((3, 256), scale), scales=layout).dequantize()
    torch.testing.assert_close(restored, torch.full((3, 256), scale), rtol=2**-8, atol=0)


def test_weights_need_not_be_contiguous():
    values = matrix(13, 7).T
    assert torch.equal(ternarize(values).packed, ternarize(values.contiguous()).packed)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("layout", ["group", "double"])
def test_slices_change_nothing(rounding, layout, monkeypatch):
    values = matrix(11, 300)
    whole = ternarize(values, rounding=rounding, scales=layout)
    monkeypatch.setattr(weight, "_CHUNK_WEIGHTS", 700)  # two rows at a time
    sliced = ternarize(values, rounding=rounding, scales=layout)
    assert torch.equal(whole.packed, sliced.packed)
    assert torch.equal(whole.scale, sliced.scale)
    assert layout == "group" or torch.equal(whole.multiplier, sliced.multiplier)


class LargestFloat32(TorchDispatchMode):
    """Remembers the largest float32 tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_no_float32_tensor_is_larger_than_a_slice(rounding, monkeypatch):
    monkeypatch.setattr(weight, "_CHUNK_WEIGHTS", 4096)
    values = matrix(256, 512).to(torch.bfloat16)
    with LargestFloat32() as seen:
        ternarize(values, rounding=rounding)
    assert 0 < seen.numel <= 4096


@pytest.mark.parametrize(
    ("in_features", "group_size", "layout"),
    [(128, 128, "group"), (256, 128, "group"), (257, 128, "double"), (3072, 128, "double"), (3072, 3072, "group")],
)
def test_auto_takes_the_smaller_layout(in_features, group_size, layout):
    assert scale_layout("auto", in_features, group_size) == layout
    sizes = {}
    for requested in ("group", "double"):
        packed = ternarize(matrix(4, in_features), group_size=group_size, scales=requested)
        tensors = [packed.scale, *([] if packed.multiplier is None else [packed.multiplier])]
        sizes[requested] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sizes[layout] == min(sizes.values())
    assert ternarize(matrix(4, in_features), group_size=group_size).spec.scales == layout


def test_an_unknown_rounding_is_a_readable_error():
    with pytest.raises(ValueError, match="rounding='nearest' is not one of twn, optimum, absmean"):
        ternarize(matrix(2, 8), rounding="nearest")


def test_an_unknown_layout_is_a_readable_error():
    with pytest.raises(ValueError, match="scales='triple' is not one of"):
        ternarize(matrix(2, 8), scales="triple")


@pytest.mark.parametrize("group_size", [0, -1])
def test_an_impossible_group_size_is_a_readable_error(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size} "):
        ternarize(matrix(2, 8), group_size=group_size)


@pytest.mark.parametrize("freedom", [3, 5, 1000])
def test_double_scales_cost_nothing_that_can_be_seen(freedom):
    """The claim of `scale_layout`, on Student-t weights; the table is benchmarks/results/scales.csv."""
    generator = torch.Generator().manual_seed(0)
    chi_squared = torch.randn(64, 1024, freedom, generator=generator).square().sum(dim=-1)
    values = torch.randn(64, 1024, generator=generator) * (freedom / chi_squared).sqrt()

    def snr(layout: str) -> float:
        error = values - ternarize(values, scales=layout).dequantize()
        return 10 * torch.log10(values.square().sum() / error.square().sum()).item()

    assert abs(snr("group") - snr("double")) < 0.005
