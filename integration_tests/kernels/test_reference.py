# SPDX-License-Identifier: Apache-2.0
"""The plain torch map against numpy in float64."""

import numpy as np
import pytest
import torch

from diffusers_ternary.format import TernarySpec
from diffusers_ternary.kernels import reference
from diffusers_ternary.ternarize import ternarize
from integration_tests.support.operands import of_parts


def packed_and_dense(rows: int, columns: int, group_size: int, layout: str, seed: int = 0):
    """A packed weight and the same weight in float64, computed by numpy from codes and scales."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = ternarize(weight, group_size=group_size, scales=layout)
    scale = packed.scale.double().numpy()
    if packed.multiplier is not None:
        scale = scale * packed.multiplier.numpy().astype(np.float64) / 63
    column_groups = np.arange(columns) // packed.spec.group_size
    return packed, packed.codes().numpy().astype(np.float64) * scale[:, column_groups]


def call(x, packed, bias=None, activation_dtype="none"):
    spec: TernarySpec = packed.spec
    return of_parts(reference.linear)(
        x,
        packed.packed,
        packed.scale,
        packed.multiplier,
        bias,
        in_features=spec.in_features,
        group_size=spec.group_size,
        activation_dtype=activation_dtype,
    )


@pytest.mark.parametrize("layout", ["group", "double"])
@pytest.mark.parametrize(("columns", "group_size"), [(1, 1), (7, 3), (128, 128), (130, 64), (257, 257)])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0)])
def test_linear_against_numpy(lead, columns, group_size, layout):
    packed, dense = packed_and_dense(9, columns, group_size, layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*lead, columns, generator=generator)
    bias = torch.randn(9, generator=generator)
    expected = x.double().numpy() @ dense.T + bias.double().numpy()
    y = call(x, packed, bias)
    assert y.shape == (*lead, 9)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_16_bit_inputs(dtype, tolerance):
    packed, dense = packed_and_dense(16, 256, 128, "double")
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(2))
    expected = x.double().numpy() @ dense.T + bias.double().numpy()
    y = call(x, packed, bias)
    assert y.dtype == dtype
    error = np.abs(y.double().numpy() - expected).max() / np.abs(expected).max()
    assert error < tolerance


def numpy_int8(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.where(scale > 0, np.rint(x / np.where(scale > 0, scale, 1)), 0) * scale


def numpy_e4m3(x: np.ndarray) -> np.ndarray:
    """To the nearest multiple of the spacing of float8_e4m3fn: 3 mantissa bits, least exponent -6, ties to even."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 448
    scaled = x / np.where(scale > 0, scale, 1)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
    spacing = 2.0 ** (exponent - 3)
    return np.rint(scaled / spacing) * spacing * scale


@pytest.mark.parametrize(("activation_dtype", "rule"), [("int8", numpy_int8), ("float8_e4m3fn", numpy_e4m3)])
def test_activation_rounding_against_numpy(activation_dtype, rule):
    # Powers of two scale exactly, so that ties and bounds are the same in float32 and float64.
    generator = torch.Generator().manual_seed(3)
    limit = 127 if activation_dtype == "int8" else 448
    x = torch.randint(-2 * limit, 2 * limit + 1, (6, 50), generator=generator).float() / 2
    x[:, 0] = limit
    x[2] = 0
    expected = rule(x.double().numpy())
    rounded = reference.fake_quantize_activations(x, activation_dtype)
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-6, atol=0)
    packed, dense = packed_and_dense(9, 50, 16, "group")
    np.testing.assert_allclose(
        call(x, packed, None, activation_dtype).numpy(), expected @ dense.T, rtol=1e-4, atol=1e-3 * limit
    )


@pytest.mark.parametrize(("activation_dtype", "bound"), [("int8", 1 / 254), ("float8_e4m3fn", 1 / 16)])
def test_activation_rounding_error_is_bounded_per_token(activation_dtype, bound):
    x = torch.randn(64, 333, generator=torch.Generator().manual_seed(4))
    rounded = reference.fake_quantize_activations(x, activation_dtype)
    assert ((rounded - x).abs() <= bound * 1.001 * x.abs().amax(dim=-1, keepdim=True)).all()
    torch.testing.assert_close(rounded.abs().amax(dim=-1), x.abs().amax(dim=-1))


@pytest.mark.parametrize("activation_dtype", ["int8", "float8_e4m3fn"])
def test_bad_tokens_spoil_only_themselves(activation_dtype):
    x = torch.ones(4, 8)
    x[1, 3] = float("nan")
    x[2, 3] = float("inf")
    rounded = reference.fake_quantize_activations(x, activation_dtype)
    assert torch.equal(rounded[[0, 3]], x[[0, 3]])
    assert rounded[1].isnan().all()
    assert rounded[2].isnan().all()


@pytest.mark.parametrize("activation_dtype", ["none", "auto"])
def test_none_and_auto_leave_activations_alone(activation_dtype):
    packed, dense = packed_and_dense(9, 50, 16, "group")
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    np.testing.assert_allclose(
        call(x, packed, None, activation_dtype).numpy(), x.double().numpy() @ dense.T, rtol=1e-4, atol=1e-4
    )
