# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel against float32: compiled where a GPU is, under Triton's interpreter otherwise.

The interpreter is chosen when Triton is imported, so without a GPU `test_interpreted.py` runs this file
in a process of its own. Inputs lie between poisoned guards, outputs and scratch are poisoned before each run.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusers_ternary.format import double_quantize, group_scales, unpack_planes
from diffusers_ternary.kernels import reference
from diffusers_ternary.ternarize import rotate, ternarize
from integration_tests.support.interpreter import skip_without_interpreter


triton: Any = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    skip_without_interpreter()
INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: run by test_interpreted.py", allow_module_level=True)

from diffusers_ternary.kernels import triton as kernels  # noqa: E402
from diffusers_ternary.kernels.triton import launch, product  # noqa: E402
from diffusers_ternary.kernels.triton.devices import target_of  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import ACTIVATION_ERROR, Plan  # noqa: E402
from diffusers_ternary.kernels.triton.weights import PackedWeight  # noqa: E402
from integration_tests.support.operands import of_parts, of_weight_parts  # noqa: E402


DEVICE = "cpu" if INTERPRETED else "cuda"
TARGET = target_of(DEVICE, 0)
assert TARGET is not None
EIGHT_BITS = TARGET.activation_dtypes
FLOATS = (torch.float16, torch.float32) + (() if INTERPRETED else (torch.bfloat16,))  # interpreted bfloat16 is wrong
LAYOUTS = {"row": (None, "group"), "group": (100, "group"), "double": (64, "double")}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative RMS; one rounding of operands
GUARD = 64


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fixes the seed; fills what `torch.empty` returns with NaN (floats) or the largest value (integers)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device, between values that spoil any result they reach."""
    poison = math.nan if tensor.is_floating_point() else 0x55
    buffer = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype, device=DEVICE)
    inner = buffer[GUARD:-GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def make_weight(n: int, k: int, layout: str, *, hadamard: int = 0, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    size, scales = LAYOUTS[layout]
    # Columns of very different sizes: a scale applied to the wrong group shows.
    dense = torch.randn(n, k, generator=generator) * torch.linspace(0.01, 0.2, k)
    packed = ternarize(dense, group_size=size, scales=scales)
    multiplier = None if packed.multiplier is None else guarded(packed.multiplier.view(torch.int8))
    return PackedWeight(guarded(packed.packed), guarded(packed.scale), multiplier, k, packed.spec.group_size, hadamard)


def expected_weight(weight: PackedWeight, activation_dtype: str) -> torch.Tensor:
    """The dense float32 weight that a kernel should multiply by, made without the kernels."""
    codes = unpack_planes(weight.packed.cpu(), weight.in_features).float()
    scale, multiplier = weight.scale.cpu(), weight.multiplier
    multiplier = None if multiplier is None else multiplier.cpu()
    if activation_dtype != "none" and not weight.per_row:
        if multiplier is None:
            largest = scale.float().amax(dim=1, keepdim=True)
            scale, multiplier = largest, (scale.float() / largest * 63).round().clamp(1, 63)
        if activation_dtype == "float8_e4m3fn":
            multiplier = multiplier.float().to(torch.float8_e4m3fn).float()
    scales = group_scales(scale, multiplier)
    return codes * scales.repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().float() - expected).norm() / expected.norm())


GEMV = Plan("gemv", 16, 16, 64)
FUSED = Plan("fused", 32, 32, 64)
FUSED_LEFT = Plan("fused", 32, 32, 64, weight_left=True)
DENSE = Plan("dense", 32, 32, 64)
LIBRARY = Plan("library")
# M, N, K: below one tile, exact tiles, primes, one past a tile, K that is not a multiple of 4.
SMALL = [(1, 16, 64), (16, 48, 256), (5, 37, 251)]
LARGE = [(19, 37, 250), (33, 65, 131)]
PRODUCTS = [
    *[(GEMV, shape) for shape in SMALL],
    *[(FUSED, shape) for shape in (*LARGE, (32, 64, 256))],
    *[(FUSED_LEFT, shape) for shape in ((19, 37, 250), (32, 64, 256))],
    *[(DENSE, shape) for shape in LARGE],
    (LIBRARY, (19, 40, 250)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("plan", "shape"), PRODUCTS, ids=lambda value: getattr(value, "path", str(value)))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_product(plan, shape, layout, dtype):
    if plan is DENSE:
        pytest.skip("the dense kernel is for 8 bits")
    m, n, k = shape
    weight = make_weight(n, k, layout)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    y = product.run(plan, guarded(x), weight, guarded(bias), "none", TARGET)
    expected = F.linear(x.float(), expected_weight(weight, "none"), bias.float())
    assert y.dtype == dtype
    assert relative_rms(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("plan", "shape"), PRODUCTS, ids=lambda value: getattr(value, "path", str(value)))
@pytest.mark.parametrize("activation_dtype", EIGHT_BITS)
def test_8_bit_product(plan, shape, layout, activation_dtype):
    m, n, k = shape
    dtype = torch.float16
    if plan is LIBRARY and activation_dtype == "float8_e4m3fn":
        if INTERPRETED:
            pytest.skip("torch has no float8 product with row scales on the CPU")
        dtype, n = torch.bfloat16, 48
    weight = make_weight(n, k, layout)
    x, bias = guarded(torch.randn(m, k).to(dtype)), guarded(torch.randn(n).to(dtype))
    y = product.run(plan, x, weight, bias, activation_dtype, TARGET)
    # What the activations were rounded to is tested below; here they are given.
    codes, scale = launch.quantize_activations(x, activation_dtype)
    values = codes.float() if activation_dtype == "int8" else codes.view(torch.float8_e4m3fn).float()
    rounded = values.cpu()[:, :k] * scale.cpu()[:, None]
    expected = F.linear(rounded, expected_weight(weight, activation_dtype), bias.cpu().float())
    assert relative_rms(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("plan", [GEMV, FUSED, FUSED_LEFT], ids=["gemv", "fused", "left"])
@pytest.mark.parametrize("activation_dtype", ["none", *EIGHT_BITS])
@pytest.mark.parametrize("k", [512, 700])  # groups of 64 end with blocks of 64, or inside them
def test_group_scales_of_sums(plan, activation_dtype, k):
    m, n = (5 if plan is GEMV else 19), 37
    weight = make_weight(n, k, "double")
    x = guarded(torch.randn(m, k).half())
    plan = dataclasses.replace(plan, scale_sums=True)
    y = product.run(plan, x, weight, None, activation_dtype, TARGET).cpu()
    rounded = x.cpu().float()
    if activation_dtype != "none":
        codes, scale = launch.quantize_activations(x, activation_dtype)
        values = codes.float() if activation_dtype == "int8" else codes.view(torch.float8_e4m3fn).float()
        rounded = values.cpu()[:, :k] * scale.cpu()[:, None]
    # Sums take the multipliers as they are; only scaled codes of float8 have them rounded.
    exact = weight.group_mode(plan.block_k) == 1
    assert exact == (k == 512)
    expected = rounded @ expected_weight(weight, "none" if exact else activation_dtype).T
    assert relative_rms(y, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("plan", [GEMV, FUSED, FUSED_LEFT], ids=lambda plan: plan.path)
def test_nothing_is_written_outside(plan):
    m, n, k = (5 if plan is GEMV else 19), 37, 250
    weight = make_weight(n, k, "double")
    x = guarded(torch.randn(m, k).half())
    buffer = torch.full((m * n + 2 * GUARD,), math.nan, dtype=torch.float16, device=DEVICE)
    y = buffer[GUARD:-GUARD].view(m, n)
    launch.packed_product(x, None, weight, None, y, kind="float", plan=plan, inline_ptx=TARGET.inline_ptx)
    assert torch.isfinite(y).all()
    assert buffer[:GUARD].isnan().all()
    assert buffer[-GUARD:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(16, 512), (37, 250), (3, 1), (19, 1031), (5, 2240)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_equals_the_reference(n, k, layout, dtype):
    weight = make_weight(n, k, layout)
    options = {"in_features": k, "group_size": weight.group_size, "dtype": dtype}
    dense = of_weight_parts(kernels.dequantize)(weight.packed, weight.scale, weight.multiplier, **options)
    expected = of_weight_parts(reference.dequantize)(weight.packed, weight.scale, weight.multiplier, **options)
    assert torch.equal(dense, expected)


# K whose planes end inside runs of 16 bytes, whose last plane has no column, and whose group scales run over 16 bytes.
@pytest.mark.parametrize(("k", "columns"), [(250, 256), (5, 16), (2240, 2304), (64, 128)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation_dtype", EIGHT_BITS)
def test_unpacked_operand_is_exact(layout, activation_dtype, k, columns):
    n, alignment = 21, 16 if k < 64 else 128
    weight = make_weight(n, k, layout)
    integers = weight if weight.multiplier is not None or weight.per_row else launch.derive_multipliers(weight)
    kind = launch.KINDS[activation_dtype]
    dense, row_scale = launch.unpack_8bit(integers, kind, inline_ptx=TARGET.inline_ptx, alignment=alignment)
    values = dense.float() if kind == "int8" else dense.view(torch.float8_e4m3fn).float()
    assert dense.shape == (n, columns)
    assert not values[:, k:].any()
    torch.testing.assert_close(
        values.cpu()[:, :k] * row_scale.cpu()[:, None], expected_weight(weight, activation_dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("m", "k"), [(3, 1), (5, 250), (2, 4096), (2, 16387)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_activations(m, k, dtype):
    x = torch.randn(m, k).to(dtype)
    codes, scale = launch.quantize_activations(guarded(x), "int8")
    codes, scale = codes.cpu(), scale.cpu()
    exact = x.float().abs().amax(dim=1) / 127
    torch.testing.assert_close(scale, exact, rtol=1e-6, atol=0)
    # The kernel multiplies by the inverse: only a value within 1e-4 of a tie may round the other way.
    assert float((codes[:, :k].float() - x.float() / exact[:, None]).abs().max()) <= 0.5 + 1e-4
    assert not codes[:, k:].any()


@pytest.mark.skipif("float8_e4m3fn" not in EIGHT_BITS, reason="no float8 on this device")
@pytest.mark.parametrize(("m", "k"), [(3, 1), (5, 250), (2, 16387)])
def test_float8_activations(m, k):
    x = torch.randn(m, k)
    codes, scale = launch.quantize_activations(guarded(x), "float8_e4m3fn")
    values = codes.cpu().view(torch.float8_e4m3fn).float()
    exact = x.abs().amax(dim=1) / 448
    torch.testing.assert_close(scale.cpu(), exact, rtol=1e-6, atol=0)
    scaled = x / exact[:, None]
    expected = scaled.to(torch.float8_e4m3fn).float()
    wrong = (values[:, :k] - expected).abs() > expected.abs() / 8  # more than one step apart
    if INTERPRETED:
        # Its cast loses the carry where rounding reaches the next power of two, and truncates subnormals.
        mantissa, _ = torch.frexp(expected)
        wrong &= (mantissa.abs() != 0.5) & (expected.abs() >= 2**-6)
    assert not wrong.any()
    assert not values[:, k:].any()


# Blocks that divide K, that leave columns unrotated, and that are longer than what one program holds of K.
ROTATIONS = [(3, 256, 128), (5, 250, 32), (2, 300, 256), (7, 131, 2), (1, 64, 64), (2, 16500, 128), (2, 16500, 1024)]


@pytest.mark.parametrize(("m", "k", "block"), ROTATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotation(m, k, block, dtype):
    x = torch.randn(m, k).to(dtype)
    y = kernels.rotate(guarded(x), block).cpu()
    expected = rotate(x.double(), block)
    assert y.dtype == dtype
    assert torch.equal(y[:, k - k % block :], x[:, k - k % block :])
    torch.testing.assert_close(y, expected.to(dtype), rtol=TOLERANCE[dtype], atol=4e-6)


@pytest.mark.parametrize(("m", "k", "block"), ROTATIONS)
def test_rotated_int8_activations(m, k, block):
    x = torch.randn(m, k)
    codes, scale = launch.quantize_activations(guarded(x), "int8", block)
    codes, scale = codes.cpu(), scale.cpu()
    rotated = rotate(x.double(), block).float()
    exact = rotated.abs().amax(dim=1) / 127
    torch.testing.assert_close(scale, exact, rtol=1e-5, atol=0)
    assert float((codes[:, :k].float() - rotated / exact[:, None]).abs().max()) <= 0.5 + 1e-3
    assert not codes[:, k:].any()


@pytest.mark.parametrize("plan", [GEMV, FUSED, LIBRARY], ids=lambda plan: plan.path)
@pytest.mark.parametrize("activation_dtype", ["none", *EIGHT_BITS])
def test_rotated_product(plan, activation_dtype):
    if plan is LIBRARY and activation_dtype == "float8_e4m3fn" and INTERPRETED:
        pytest.skip("torch has no float8 product with row scales on the CPU")
    m, n, k = (5 if plan is GEMV else 19), 48, 250
    dtype = torch.bfloat16 if plan is LIBRARY and activation_dtype == "float8_e4m3fn" else torch.float16
    weight = make_weight(n, k, "double", hadamard=32)
    x = guarded(torch.randn(m, k).to(dtype))
    y = product.run(plan, x, weight, None, activation_dtype, TARGET)
    if activation_dtype == "none":
        rotated = rotate(x.cpu().float(), 32)
    else:
        codes, scale = launch.quantize_activations(x, activation_dtype, 32)
        values = codes.float() if activation_dtype == "int8" else codes.view(torch.float8_e4m3fn).float()
        rotated = values.cpu()[:, :k] * scale.cpu()[:, None]
    assert relative_rms(y, rotated @ expected_weight(weight, activation_dtype).T) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation_dtype", EIGHT_BITS)
def test_odd_tokens(activation_dtype):
    x = torch.randn(5, 40)
    x[0] = 0.0
    x[1, 3] = math.nan
    x[2, 7] = math.inf
    x[3] = 1e-38
    weight = make_weight(16, 40, "row")
    y = product.run(GEMV, guarded(x), weight, None, activation_dtype, TARGET).cpu()
    assert not y[0].any()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert float(y[3].abs().max()) < 1e-30
    assert torch.isfinite(y[4]).all()


def test_derived_multipliers():
    weight = make_weight(33, 1000, "group")
    weight.scale[0] = 0
    weight.scale[1, 2:] = 0
    derived = launch.derive_multipliers(weight)
    assert derived.multiplier is not None
    row, multiplier = derived.scale.cpu(), derived.multiplier.cpu()
    scale = weight.scale.cpu().float()
    assert torch.equal(row[:, 0], scale.amax(dim=1))
    assert torch.equal(multiplier == 0, scale == 0)
    bound = row / 126 + 1e-7
    clamped = (scale > 0) & (scale < row / 126)
    assert ((row * multiplier / 63 - scale).abs() <= bound)[~clamped].all()
    _, expected = double_quantize(scale[2:])
    assert int((multiplier[2:].int() - expected.int()).abs().max()) <= 1  # 16-bit row scale there, ties


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation_dtype", EIGHT_BITS)
def test_error_of_8_bit_activations_is_within_the_table(layout, activation_dtype):
    m, n, k = 32, 32, 1024
    weight = make_weight(n, k, layout)
    x = torch.randn(m, k)
    kind = launch.KINDS[activation_dtype]
    if kind == "fp8":  # torch casts: the interpreter's cast is wrong at powers of two
        scale = x.abs().amax(dim=1) / 448
        codes = (x / scale[:, None]).to(torch.float8_e4m3fn).view(torch.int8)
    else:
        scale = x.abs().amax(dim=1) / 127
        codes = (x / scale[:, None]).round().to(torch.int8)
    integers = weight if weight.multiplier is not None or weight.per_row else launch.derive_multipliers(weight)
    y = torch.empty(m, n, device=DEVICE)
    launch.packed_product(
        guarded(codes), guarded(scale), integers, None, y, kind=kind, plan=FUSED, inline_ptx=TARGET.inline_ptx
    )
    error = relative_rms(y, x @ expected_weight(weight, "none").T)
    assert error <= ACTIVATION_ERROR[activation_dtype][0 if weight.per_row else 1]


@pytest.mark.parametrize("activation_dtype", ["auto", "none", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 2, 11), (0, 4)])
def test_public_function(shape, activation_dtype):
    n, k = 24, 72
    weight = make_weight(n, k, "double")
    x = torch.randn(*shape, 2 * k).half().to(DEVICE)[..., ::2]  # not contiguous
    y = of_parts(kernels.linear)(
        x,
        weight.packed,
        weight.scale,
        weight.multiplier,
        None,
        in_features=k,
        group_size=weight.group_size,
        activation_dtype=activation_dtype,
    )
    assert y.shape == (*shape, n)
    assert y.dtype == x.dtype
    if y.numel():
        expected = F.linear(x.cpu().float(), expected_weight(weight, "none"))
        # The interpreter's cast to float8 is wrong at powers of two.
        assert relative_rms(y, expected) < (0.1 if INTERPRETED else 0.06)
