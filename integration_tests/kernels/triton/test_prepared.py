# SPDX-License-Identifier: Apache-2.0
"""Prepared calls repeat what the first call launched, with the addresses of the second.

With a stand-in for the driver every launch is compared, argument for argument, with what Triton's own launch of the
same call gives; under the interpreter, in a process of its own, results are compared.
"""

import itertools

import pytest
import torch

from diffusers_ternary.kernels import triton as kernels
from diffusers_ternary.kernels.operands import Layout
from diffusers_ternary.kernels.ops import prepared as prepared_ops
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import ternarize
from integration_tests.support.fresh_process import run_python


pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from integration_tests.support.gpu_compiler import TARGETS
from integration_tests.support.stand_in_driver import standing_in


N, K, GROUP = 64, 256, 64


def operands(seed: int, *, scales: str = "double", bias: bool = True) -> tuple[torch.Tensor | None, ...]:
    generator = torch.Generator().manual_seed(seed)
    packed = ternarize(torch.randn(N, K, generator=generator), group_size=GROUP, scales=scales)
    return packed.packed, packed.scale, packed.multiplier, torch.zeros(N, dtype=torch.bfloat16) if bias else None


def prepare(rows: int, activation_dtype: str, hadamard: int = 0):
    shape, device = torch.Size((rows, K)), torch.device("cpu")
    layout = Layout(N, K, GROUP, torch.float16, True, torch.bfloat16, activation_dtype, hadamard)
    return kernels.prepare(shape, torch.bfloat16, device, layout)


def addresses_inside(launches) -> list[tuple[object, ...]]:
    """Launches without the addresses of buffers, which differ from call to call: by order of first use instead."""
    known: dict[int, str] = {}

    def named(value: object) -> object:
        if isinstance(value, int) and value > 1 << 32:
            return known.setdefault(value, f"tensor {len(known)}")
        return value

    return [(each.kernel, each.grid, tuple(named(v) for v in each.arguments)) for each in launches]


@pytest.mark.parametrize(
    ("rows", "activation_dtype", "hadamard", "names"),
    [
        (1, "none", 0, ["gemv_kernel"]),
        (1, "none", 64, ["rotate_kernel", "gemv_kernel"]),
        (40, "int8", 64, ["quantize_kernel", "fused_kernel"]),
        (2000, "int8", 0, ["quantize_kernel", "unpack_kernel", "dense_kernel"]),
    ],
)
def test_later_calls_launch_what_triton_would(monkeypatch, rows, activation_dtype, hadamard, names):
    with standing_in(TARGETS["sm_80"]) as launches:
        call = prepare(rows, activation_dtype, hadamard)
        x, other = (torch.randn(rows, K, dtype=torch.bfloat16) for _ in range(2))
        call(x, *operands(0))
        assert [each.kernel for each in launches] == names
        launches.clear()
        # What Triton's own launch makes of the second call.
        mine = operands(1)
        y = prepare(rows, activation_dtype, hadamard)(other, *mine)
        assert y.shape == (rows, N)
        expected = addresses_inside(launches)
        launches.clear()

        def refuse(*_, **__):
            raise AssertionError("a later call binds no arguments")

        monkeypatch.setattr(JITFunction, "run", refuse)
        z = call(other, *mine)
        assert (z.shape, z.dtype) == (y.shape, y.dtype)
        assert addresses_inside(launches) == expected
        used = {value for each in launches for value in each.arguments if isinstance(value, int)}
        assert {t.data_ptr() for t in (other, *mine) if t is not None} <= used
        assert z.data_ptr() in used


def test_group_scales_become_multipliers_in_each_call():
    with standing_in(TARGETS["sm_80"]) as launches:
        call = prepare(40, "int8")
        x = torch.randn(40, K, dtype=torch.bfloat16)
        for _ in range(2):
            call(x, *operands(0, scales="group", bias=False))
        kernels_used = [each.kernel for each in launches]
        assert kernels_used == ["quantize_kernel", "derive_multipliers_kernel", "fused_kernel"] * 2


def test_an_input_that_is_not_aligned_is_compiled_for_and_not_repeated():
    with standing_in(TARGETS["sm_80"]) as launches:
        call = prepare(1, "none")
        memory = torch.randn(K + 8, dtype=torch.bfloat16)
        aligned, shifted = memory[:K].view(1, K), memory[1 : K + 1].view(1, K)
        weight = operands(0)
        for x in (aligned, aligned, shifted, shifted, aligned):
            call(x, *weight)
            assert launches[-1].arguments[0] == x.data_ptr()
        assert len(launches) == 5


def test_nothing_is_recorded_while_a_graph_is_captured(monkeypatch):
    from diffusers_ternary.kernels.triton import prepared

    with standing_in(TARGETS["sm_80"]) as launches:
        monkeypatch.setattr(prepared, "is_capturing", lambda _: True)
        call, x = prepare(1, "none"), torch.randn(1, K, dtype=torch.bfloat16)
        call(x, *operands(0))
        assert call._replay is None
        monkeypatch.setattr(prepared, "is_capturing", lambda _: False)
        call(x, *operands(0))
        assert call._replay is not None
        monkeypatch.setattr(prepared, "is_capturing", lambda _: True)
        call(x, *operands(0))
        assert len(launches) == 3


def test_buffers_do_not_overlap():
    with standing_in(TARGETS["sm_80"]) as launches:
        call, x = prepare(2000, "int8"), torch.randn(2000, K, dtype=torch.bfloat16)
        for _ in range(2):
            y = call(x, *operands(0))
    quantize, unpack, dense = launches[3:]
    codes, row_scales = quantize.arguments[1:3]
    weight8, weight_scales = unpack.arguments[3:5]
    spans = sorted(
        [(codes, 2000 * K), (row_scales, 2000 * 4), (weight8, N * K), (weight_scales, N * 4), (y.data_ptr(), 4000 * N)]
    )
    for (first, size), (second, _) in itertools.pairwise(spans):
        assert first + size <= second
    assert dense.arguments[:6] == (codes, weight8, weight_scales, row_scales, dense.arguments[4], y.data_ptr())


def test_a_call_that_torch_takes_part_in_is_repeated_with_tensors(monkeypatch):
    """The vendor's product is called with views of buffers, not with addresses."""
    from diffusers_ternary.kernels.triton import product

    seen = []

    def multiply(x, dense, x_scale, row_scale, bias, dtype, fast):
        seen.append((x.dtype, x.shape, dense.dtype, dense.shape, dense.stride(), x_scale.shape, row_scale.shape, bias))
        return torch.empty(x.shape[0], dense.shape[1], dtype=dtype)

    monkeypatch.setattr(product, "_scaled_mm", multiply)
    with standing_in(TARGETS["sm_90"]) as launches:
        call, x = prepare(2000, "float8_e4m3fn"), torch.randn(2000, K, dtype=torch.bfloat16)
        weight = operands(0)
        for _ in range(3):
            assert call(x, *weight).shape == (2000, N)
        assert [each.kernel for each in launches] == ["quantize_kernel", "unpack_kernel"] * 3
        assert call._replay is not None
        assert not call._replay.by_address
    eight = torch.float8_e4m3fn
    assert seen == [(eight, (2000, K), eight, (K, N), (1, K), (2000, 1), (1, N), weight[3])] * 3


def test_what_comes_from_elsewhere_is_not_repeated():
    from diffusers_ternary.kernels.triton.recording import Recording, library

    x, unknown = torch.ones(2), torch.ones(2)
    recording = Recording((x, None))
    with recording.on():
        y = library(torch.add, x, unknown)
    assert recording.replay(y, (2,)) is None
    recording = Recording((x, None))
    with recording.on():
        y = library(torch.add, x, 1)
    assert recording.replay(torch.ones(2), (2,)) is None
    repeat = recording.replay(y, (2, 1))
    assert torch.equal(repeat((torch.full((2,), 5.0), None), (0, 0), 0), torch.full((2, 1), 6.0))


def test_layers_take_the_quick_way_to_the_gpu(monkeypatch):
    """From `forward` to the launcher, with the driver as the only thing that is not real."""
    monkeypatch.setitem(prepared_ops._PREPARE, "cpu", prepared_ops._prepare_triton)
    monkeypatch.setattr(prepared_ops, "triton_serves", lambda _: True)
    generator = torch.Generator().manual_seed(0)
    packed = ternarize(torch.randn(N, K, generator=generator), group_size=GROUP, scales="double", hadamard=64)
    layer = TernaryLinear.from_weight(packed, torch.randn(N), activation_dtype="int8")
    prepared_ops.prepared_products.cache_clear()
    with standing_in(TARGETS["sm_80"]) as launches:
        for _ in range(3):
            assert layer(torch.randn(2, 10, K, dtype=torch.bfloat16)).shape == (2, 10, N)
    prepared_ops.prepared_products.cache_clear()
    assert [each.kernel for each in launches] == ["quantize_kernel", "fused_kernel"] * 3
    weights = [each.arguments[1] for each in launches if each.kernel == "fused_kernel"]
    assert weights == [layer.weight.data_ptr()] * 3


@pytest.mark.parametrize(
    ("target", "n", "expected"),
    [("sm_90", 64, "float8_e4m3fn"), ("sm_90", 40, None), ("sm_80", 64, "int8"), ("sm_80", 65, None)],
)
def test_where_the_vendors_product_serves_many_rows(target, n, expected):
    """Row scales of the float8 product want whole 16-byte rows, the int8 product 8 columns."""
    with standing_in(TARGETS[target]):
        layout = Layout(n, 4096 * 16, GROUP, torch.float16, True, None, "auto")
        found = kernels.library_dtype(torch.device("cpu"), torch.bfloat16, layout)
    assert found == expected


def test_results_under_the_interpreter():
    outcome = run_python(
        """
        import json, torch
        from diffusers_ternary.kernels import triton as kernels
        from diffusers_ternary.kernels.triton import Layout, dispatch
        from diffusers_ternary.ternarize import ternarize
        from integration_tests.support.operands import of_parts, of_weight_parts
        torch.manual_seed(0)
        errors = {}
        for scales, group, hadamard in (("double", 32, 32), ("group", 60, 0)):
            for rows, activation_dtype in ((2, "none"), (9, "int8"), (33, "int8"), (40, "int8")):
                dispatch.UNPACK_FIRST_ROWS = 40
                k = 132
                shape = torch.Size((1, rows, k))
                weights = []
                for _ in range(2):
                    w = ternarize(torch.randn(24, k), group_size=group, scales=scales, hadamard=hadamard)
                    weights.append((w.packed, w.scale, w.multiplier, torch.randn(24)))
                options = {"in_features": k, "group_size": w.spec.group_size, "hadamard": hadamard}
                options["activation_dtype"] = activation_dtype
                layout = Layout(
                    24, k, w.spec.group_size, torch.float16, scales == "double", None, activation_dtype, hadamard
                )
                call = kernels.prepare(shape, torch.float16, torch.device("cpu"), layout)
                for operands in (*weights, weights[0]):
                    x = torch.randn(shape, dtype=torch.float16)
                    y = call(x, *operands)
                    assert y.shape == (1, rows, 24)
                    expected = of_parts(kernels.linear)(x, *operands, **options)
                    key = f"{scales} {group} {hadamard} {rows} {activation_dtype}"
                    same = torch.equal(y, expected)
                    errors[key] = errors.get(key, True) and same and call._replay is not None
        from diffusers_ternary.kernels.ops.traced import unpack_reference
        for scales, group in (("double", 32), ("group", 60), ("group", None)):
            w = ternarize(torch.randn(24, 132), group_size=group, scales=scales)
            operands = (w.packed, w.scale, w.multiplier)
            for dtype in ("int8", "float8_e4m3fn"):
                options = {"in_features": 132, "group_size": w.spec.group_size}
                values, scale = of_weight_parts(kernels.unpack_8bit)(*operands, **options, activation_dtype=dtype)
                expected, expected_scale = of_weight_parts(unpack_reference)(*operands, **options, dtype=dtype)
                same = values.dtype == expected.dtype and values.shape == expected.shape
                dense, expected = values.float() * scale[:, None], expected.float() * expected_scale[:, None]
                same = same and torch.allclose(dense, expected, rtol=1e-6, atol=0)
                errors[f"unpack {scales} {group} {dtype}"] = same
        print(json.dumps(errors))
        """,
        TRITON_INTERPRET="1",
    )
    assert len(outcome) == 14
    assert all(outcome.values()), outcome
