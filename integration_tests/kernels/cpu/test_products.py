# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against int64 and float64 torch: every variant of this machine, and the torch-only path."""

import math
import multiprocessing
import random
import threading

import pytest
import torch
import torch.nn.functional as F

from diffusers_ternary.format import expand_scales, group_scales, pack_planes
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import fallback, native
from diffusers_ternary.kernels.cpu import products as cpu_linear
from diffusers_ternary.kernels.operands import PackedWeight
from integration_tests.support.operands import of_parts


VARIANTS = native.variants()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

needs_library = pytest.mark.skipif(not VARIANTS, reason="the package was installed without its compiled library")
variants = pytest.mark.parametrize("variant", VARIANTS or [pytest.param("none", marks=needs_library)])
paths = pytest.mark.parametrize("path", [*VARIANTS, "torch"])


def draw_codes(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


def exact_sums(x: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    # float64 holds these integers exactly and multiplies much faster than int64
    parts = zip(x.double().split(group_size, 1), codes.double().split(group_size, 1), strict=True)
    return torch.stack([a @ b.T for a, b in parts], 1).to(torch.int32)  # [M, G, N]


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cpu_linear, "load", lambda: None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(path, *args, **kwargs):
    if path == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_linear, "load", lambda: None)
            return of_parts(cpu.linear_int8)(*args, **kwargs)
    return of_parts(cpu.linear_int8)(*args, **kwargs, library=native.load(path))


def layer(columns, in_features, group_size, *, seed, double=False, dtype=torch.float16, bias=True):
    torch.manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = draw_codes(columns, in_features, seed=seed)
    scale = (torch.rand(columns, 1 if double else groups) + 0.1).to(dtype)
    multiplier = torch.randint(0, 64, (columns, groups), dtype=torch.uint8) if double else None
    dense = codes.double() * expand_scales(group_scales(scale, multiplier), group_size, in_features)
    return pack_planes(codes), scale, multiplier, torch.randn(columns) if bias else None, dense


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The rows after int8 rounding, float64."""
    largest = x.abs().amax(-1, keepdim=True).float()
    inverse = torch.full_like(largest, 127.0) / largest
    return torch.round(x.float() * inverse).double() * (largest / 127).double()


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


# --- the integers


@variants
@pytest.mark.parametrize("seed", range(4))
def test_sums_equal_int64_over_random_shapes(variant, seed):
    library = native.load(variant)
    rng = random.Random(seed)
    for _ in range(25):
        rows = rng.choice([1, 2, 3, 5, 7, 8, 9, 11, 13, 16, 17, 29, 64, 101])
        columns = rng.choice([1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 61, 97])
        in_features = rng.choice([1, 2, 3, 5, 13, 31, 64, 97, 127, 128, 129, 257, 509, 1152, 2243])
        group_size = min(in_features, rng.choice([1, 3, 17, 32, 64, 100, 128, 10**6, 10**6]))
        if in_features > 600 and group_size < 16:
            group_size = 17
        codes = draw_codes(columns, in_features, seed=rng.randrange(10**6))
        x = torch.randint(-127, 128, (rows, in_features), dtype=torch.int8)
        sums = library.tile_sums(x, pack_planes(codes), group_size=group_size)
        shape = f"{seed=} {rows=} {columns=} {in_features=} {group_size=}"
        assert torch.equal(sums, exact_sums(x, codes, group_size)), shape


@variants
@pytest.mark.parametrize("rows", [1, 4, 19])
@pytest.mark.parametrize("in_features", [20_000, 19_997, 16_384])
@pytest.mark.parametrize("group_size", [128, 4099, 20_000])
def test_saturating_values_do_not_overflow(variant, rows, in_features, group_size):
    group_size = min(group_size, in_features)
    for code, value in ((1, 127), (-1, 127), (1, -127), (-1, -127)):
        codes = torch.full((17, in_features), code, dtype=torch.int8)
        x = torch.full((rows, in_features), value, dtype=torch.int8)
        sums = native.load(variant).tile_sums(x, pack_planes(codes), group_size=group_size)
        assert torch.equal(sums, exact_sums(x, codes, group_size))


@variants
def test_every_tail_of_every_axis(variant):
    library = native.load(variant)
    for size in range(1, 70):
        codes = draw_codes(size, size, seed=size)
        x = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        for group_size in {size, max(1, size // 3), min(size, 32)}:
            sums = library.tile_sums(x, pack_planes(codes), group_size=group_size)
            assert torch.equal(sums, exact_sums(x, codes, group_size)), (size, group_size)


# --- the layer


@paths
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
def test_layer_matches_float64(path, seed, dtype, double):
    rng = random.Random(seed)
    for _ in range(6):
        rows, columns = rng.choice([1, 3, 8, 20, 70]), rng.choice([1, 17, 48, 95])
        in_features = rng.choice([5, 64, 130, 515, 1152])
        group_size = min(in_features, rng.choice([16, 50, 128, 5000]))
        weight, scale, multiplier, bias, dense = layer(
            columns, in_features, group_size, seed=rng.randrange(10**6), double=double, dtype=rng.choice(FLOATS)
        )
        x = torch.randn(rows, in_features).to(dtype)
        y = run(path, x, weight, scale, multiplier, bias, in_features=in_features, group_size=group_size)
        assert y.dtype == dtype
        expected = rounded(x) @ dense.T + bias
        shape = f"{rows=} {columns=} {in_features=} {group_size=}"
        assert relative_error(y, expected) < PRECISION[dtype], shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("library", ["native", "torch"])
def test_exact_path_matches_float64(dtype, double, library, request):
    if library == "torch":
        request.getfixturevalue("without_library")
    weight, scale, multiplier, bias, dense = layer(90, 515, 50, seed=0, double=double)
    x = torch.randn(2, 7, 515).to(dtype)
    y = of_parts(cpu.linear_exact)(x, weight, scale, multiplier, bias, in_features=515, group_size=50)
    assert y.shape == (2, 7, 90)
    assert relative_error(y, x.double() @ dense.T + bias) < PRECISION[dtype]


def test_exact_path_in_many_blocks(monkeypatch):
    monkeypatch.setattr(cpu_linear, "EXACT_BLOCK_ELEMENTS", 4000)
    monkeypatch.setattr(cpu_linear, "EXACT_TOKEN_ELEMENTS", 4000)
    weight, scale, multiplier, bias, dense = layer(90, 515, 50, seed=0)
    x = torch.randn(200, 515).bfloat16()
    y = of_parts(cpu.linear_exact)(x, weight, scale, multiplier, bias, in_features=515, group_size=50)
    assert relative_error(y, x.double() @ dense.T + bias) < PRECISION[torch.bfloat16]


@paths
def test_all_variants_round_alike(path):
    weight, scale, _, bias, _ = layer(40, 300, 300, seed=1)
    x = torch.randn(33, 300)
    expected = run("torch", x, weight, scale, None, bias, in_features=300, group_size=300)
    y = run(path, x, weight, scale, None, bias, in_features=300, group_size=300)
    assert relative_error(y, expected.double()) < 1e-6


@variants
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 7, 31, 33, 100])
def test_quantized_rows_equal_torch(variant, dtype, columns):
    x = torch.randn(9, columns).to(dtype)
    x[3] = 0
    x[4] *= 1e-3
    q, scales = native.load(variant).quantize(x)
    expected, expected_scales, _ = fallback.quantize_tokens(x)
    assert torch.equal(q, expected)
    assert torch.equal(scales, expected_scales[:, 0])


# --- unusual rows and layouts


@paths
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("group_size", [64, 200])
def test_nan_and_infinity_stay_in_their_rows(path, rows, group_size):
    weight, scale, _, bias, dense = layer(33, 200, group_size, seed=2)
    clean = torch.randn(rows, 200)
    for value in (math.nan, math.inf, -math.inf):
        x = clean.clone()
        x[rows // 2, 17] = value
        y = run(path, x, weight, scale, None, bias, in_features=200, group_size=group_size)
        expected = F.linear(x[rows // 2], dense.float(), bias)
        torch.testing.assert_close(y[rows // 2], expected, equal_nan=True)
        others = [m for m in range(rows) if m != rows // 2]
        untouched = run(path, clean, weight, scale, None, bias, in_features=200, group_size=group_size)
        assert torch.equal(y[others], untouched[others])


@paths
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-42, 1e-38, 1e-30, 1e30, 3.4e38])
def test_extreme_magnitudes(path, size):
    weight, scale, _, _, dense = layer(20, 96, 96, seed=3, dtype=torch.float32)
    scale = scale * 1e-4
    x = torch.randn(20, 96).clamp(-1, 1)
    x[:, 0] = 1.0
    x = x * size
    y = run(path, x, weight, scale, None, None, in_features=96, group_size=96)
    expected = x.double() @ dense.T * 1e-4
    assert torch.isfinite(y).all()
    if size > 1e-39:
        assert relative_error(y, expected) < 0.03
    else:
        assert float((y.double() - expected).abs().max()) < 1e-38


@paths
def test_layouts_of_the_input(path):
    weight, scale, _, bias, _ = layer(24, 60, 20, seed=4)
    options = {"in_features": 60, "group_size": 20}
    x = torch.randn(6, 4, 60)
    expected = run(path, x, weight, scale, None, bias, **options)
    wide = torch.randn(6, 4, 100)
    wide[..., 7:67] = x
    torch.testing.assert_close(run(path, wide[..., 7:67], weight, scale, None, bias, **options), expected)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(run(path, swapped, weight, scale, None, bias, **options), expected)
    torch.testing.assert_close(run(path, x[0, 0], weight, scale, None, bias, **options), expected[0, 0])
    single = x[:1, :1].expand(6, 4, 60)
    torch.testing.assert_close(
        run(path, single, weight, scale, None, bias, **options), expected[:1, :1].expand(6, 4, 24)
    )
    assert run(path, x[:0], weight, scale, None, bias, **options).shape == (0, 4, 24)
    assert of_parts(cpu.linear_exact)(x[:0], weight, scale, None, bias, **options).shape == (0, 4, 24)


def test_wrong_shapes_are_named():
    weight, scale, _, bias, _ = layer(24, 60, 20, seed=5)
    x = torch.randn(2, 60)
    with pytest.raises(ValueError, match=r"weight is torch.int8 \[24, 15\]"):
        of_parts(cpu.linear_int8)(x, weight, scale, None, bias, in_features=64, group_size=20)
    with pytest.raises(ValueError, match="scale"):
        of_parts(cpu.linear_int8)(x, weight, scale, None, bias, in_features=60, group_size=30)
    with pytest.raises(ValueError, match="multiplier"):
        of_parts(cpu.linear_exact)(x, weight, scale[:, :1], scale, bias, in_features=60, group_size=20)
    with pytest.raises(ValueError, match="bias"):
        of_parts(cpu.linear_int8)(x, weight, scale, None, bias[:3], in_features=60, group_size=20)


# --- threads, processes, loading


@needs_library
@pytest.mark.parametrize("rows", [1, 30, 700, 1500])
def test_threads_change_nothing(rows, threads):
    weight, scale, _, bias, _ = layer(500, 640, 128, seed=6)
    x = torch.randn(rows, 640)
    threads(1)
    expected = of_parts(cpu.linear_int8)(x, weight, scale, None, bias, in_features=640, group_size=128)
    exact = of_parts(cpu.linear_exact)(x, weight, scale, None, bias, in_features=640, group_size=128)
    threads(3)
    assert torch.equal(
        of_parts(cpu.linear_int8)(x, weight, scale, None, bias, in_features=640, group_size=128), expected
    )
    again = of_parts(cpu.linear_exact)(x, weight, scale, None, bias, in_features=640, group_size=128)
    torch.testing.assert_close(again, exact)


@needs_library
def test_many_callers_at_once(threads):
    threads(2)
    weight, scale, _, bias, _ = layer(500, 640, 128, seed=7)
    inputs = [torch.randn(600, 640) for _ in range(6)]
    options = {"in_features": 640, "group_size": 128}
    expected = [of_parts(cpu.linear_int8)(x, weight, scale, None, bias, **options) for x in inputs]
    results: list[torch.Tensor | None] = [None] * 6

    def call(i: int) -> None:
        for _ in range(5):
            results[i] = of_parts(cpu.linear_int8)(inputs[i], weight, scale, None, bias, **options)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def _in_child(queue, x, weight, scale):
    torch.set_num_threads(2)
    y = of_parts(cpu.linear_int8)(x, weight, scale, None, None, in_features=640, group_size=640)
    # No torch operation that would start OpenMP: that is what hangs after a fork.
    queue.put([y[0, 0].item(), y[-1, -1].item()])


@needs_library
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_a_fork(threads):
    threads(2)
    weight, scale, _, _, _ = layer(500, 640, 640, seed=8)
    x = torch.randn(600, 640)
    expected = of_parts(cpu.linear_int8)(
        x, weight, scale, None, None, in_features=640, group_size=640
    )  # the pool exists now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x, weight, scale), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [expected[0, 0].item(), expected[-1, -1].item()]
    child.join()


@needs_library
def test_variants_are_checked_by_name():
    if VARIANTS[0] == "scalar":
        assert native.load() is None  # torch is faster than plain C
    else:
        assert native.load().variant == cpu.kernel_name() == VARIANTS[0]
    with pytest.raises(ValueError, match=r"variant='sse9' is not one of .*scalar"):
        native.load("sse9")


def test_without_the_library(without_library):
    assert cpu.kernel_name() in ("torch-onednn", "torch-blocked")


def test_missing_library_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(native, "open_library", lambda: "no such file")
    with caplog.at_level("WARNING"):
        assert native.load.__wrapped__() is None
    assert "use plain torch: no such file" in caplog.text


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_torch_path_with_and_without_onednn(monkeypatch, exact, double):
    if exact and not fallback.onednn_is_exact():
        pytest.skip("oneDNN's int8 product is inexact or missing on this CPU")
    monkeypatch.setattr(fallback, "onednn_is_exact", lambda: exact)
    monkeypatch.setattr(fallback, "BLOCK_ELEMENTS", 20_000)
    weight, scale, multiplier, bias, dense = layer(90, 515, 50 if double else 515, seed=9, double=double)
    x = torch.randn(40, 515)
    y, infinite = fallback.linear_int8(x, PackedWeight(weight, scale, multiplier, 515, 50 if double else 515), bias)
    assert not infinite
    assert relative_error(y, rounded(x) @ dense.T + bias) < 2e-6
