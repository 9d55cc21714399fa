# SPDX-License-Identifier: Apache-2.0
"""Scale layouts: error bounds, dtype choice, groups whose size does not divide the row."""

import numpy as np
import pytest
import torch

from diffusers_ternary.format import (
    double_quantize,
    expand_scales,
    group_count,
    group_scales,
    normalize_group_size,
    portable_scales,
    storage_dtype,
)


@pytest.mark.parametrize(
    ("group_size", "in_features", "size", "count"),
    [(128, 128, 128, 1), (128, 129, 128, 2), (128, 64, 64, 1), (None, 77, 77, 1), (1, 5, 1, 5), (3, 10, 3, 4)],
)
def test_group_geometry(group_size, in_features, size, count):
    assert normalize_group_size(group_size, in_features) == size
    assert group_count(in_features, size) == count


@pytest.mark.parametrize(("group_size", "in_features"), [(4, 12), (4, 13), (5, 13), (1, 3), (13, 13)])
def test_expand_scales_gives_every_column_the_scale_of_its_group(group_size, in_features):
    groups = group_count(in_features, group_size)
    scales = torch.arange(2 * groups, dtype=torch.float32).view(2, groups)
    expanded = expand_scales(scales, group_size, in_features)
    assert expanded.tolist() == [[row[k // group_size] for k in range(in_features)] for row in scales.tolist()]


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_double_quantization_keeps_its_error_bound(seed, magnitude):
    scales = magnitude * torch.rand(32, 24, generator=torch.Generator().manual_seed(seed)) ** 3
    row, multiplier = double_quantize(scales)
    assert row.shape == (32, 1)
    assert row.dtype in (torch.float16, torch.bfloat16)
    assert multiplier.dtype == torch.uint8
    assert int(multiplier.min()) >= 1
    assert int(multiplier.max()) == 63

    # Independent: numpy, float64.
    effective = row.double().numpy() * multiplier.numpy().astype(np.float64) / 63
    error = np.abs(effective - scales.double().numpy())
    epsilon = torch.finfo(row.dtype).eps / 2
    # Half a step, but a whole one below the first step, where the multiplier is 1 lest the group vanishes.
    small = multiplier.numpy() == 1
    largest = row.double().numpy() * np.ones_like(error)
    assert (error[~small] <= (largest / 126 * (1 + 2 * epsilon) + largest * epsilon)[~small]).all()
    assert (error[small] <= (largest / 63 * (1 + 2 * epsilon))[small]).all()
    np.testing.assert_allclose(group_scales(row, multiplier).numpy(), effective, rtol=1e-6)


def test_portable_scales_are_exact_in_both_16_bit_floats():
    scales = 10 ** (12 * torch.rand(20_000, generator=torch.Generator().manual_seed(0)) - 7)  # 1e-7 ... 1e5
    scales[0] = 0
    found = portable_scales(scales)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.half().float(), found.float())
    error = (found.double() - scales.double()).abs().numpy()
    exact = scales.double().numpy()
    normal = (exact >= 2**-14) & (exact <= 65280)
    assert 0.0038 < (error[normal] / exact[normal]).max() <= 2**-8
    assert error[exact < 2**-14].max() <= 2**-25 + 2**-23  # half a step of float16, and of bfloat16 below 2^-14
    assert float(found.float().max()) == 65280
    assert float(found[0]) == 0


def test_only_zero_groups_get_multiplier_zero():
    scales = torch.tensor([[0.0, 1.0, 1e-6], [0.0, 0.0, 0.0]])
    row, multiplier = double_quantize(scales)
    assert multiplier.tolist() == [[0, 63, 1], [0, 0, 0]]
    assert row[1].item() == 0
    assert group_scales(row, multiplier)[0, 0] == 0
    assert torch.isfinite(group_scales(row, multiplier)).all()


def test_group_layout_is_the_scale_itself():
    scale = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    assert torch.equal(group_scales(scale, None), scale.float())


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.01, 0.02], torch.float16),
        ([0.0, 0.02], torch.float16),
        ([0.0, 0.0], torch.float16),
        ([6.2e-5, 1.0], torch.float16),
        ([6.0e-5, 1.0], torch.bfloat16),  # float16 would be subnormal and lose digits
        ([1e-9], torch.bfloat16),
        ([65504.0], torch.float16),
        ([65536.0], torch.bfloat16),
        ([65519.0], torch.bfloat16),
    ],
)
def test_storage_dtype_is_the_one_that_loses_less(values, dtype):
    assert storage_dtype(torch.tensor([values])) == dtype


def test_scales_of_any_magnitude_stay_finite_in_storage():
    scales = torch.logspace(-30, 30, 61)[:, None]
    stored = torch.stack([row.to(storage_dtype(row)).float() for row in scales])
    assert torch.isfinite(stored).all()
    assert ((stored - scales).abs() <= scales * 2**-8).all()
