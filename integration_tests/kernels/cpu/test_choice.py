# SPDX-License-Identifier: Apache-2.0
"""The choice of a CPU kernel by layout and rows, and the dense product it may end in."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from diffusers_ternary.format import expand_scales, pack_planes
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import choice, native
from diffusers_ternary.kernels.cpu import products as cpu_linear
from integration_tests.support.operands import of_parts


NAMES = ("amx-int8", "avx512-vnni", "avx2")


@pytest.fixture
def libraries(monkeypatch):
    """Variants by name alone: the choice is the same on every machine."""
    made = {name: native.NativeLibrary(None, name, i) for i, name in enumerate(NAMES)}
    monkeypatch.setattr(choice, "load", made.__getitem__)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 8, 511, 512, 4096])
@pytest.mark.parametrize(("group_size", "multiplier"), [(1152, False), (128, False), (64, False), (16, True)])
def test_the_best_variant_serves_wide_groups_and_multipliers(libraries, name, rows, group_size, multiplier):
    for dense in (True, False):
        assert choice.choose(libraries[name], rows, group_size, 1152, multiplier, dense) is libraries[name]


@pytest.mark.parametrize("group_size", [16, 32, 48])
def test_tiles_are_not_wasted_on_short_groups(libraries, group_size):
    tiles = libraries["amx-int8"]
    for rows in (1, 16, 511):
        assert choice.choose(tiles, rows, group_size, 1152, False, True) is libraries["avx512-vnni"]
    assert choice.choose(tiles, 512, group_size, 1152, False, True) is None
    # who asks for int8 gets int8
    assert choice.choose(tiles, 512, group_size, 1152, False, False) is libraries["avx512-vnni"]
    # one group that is all of a narrow layer is one scale a row
    assert choice.choose(tiles, 512, group_size, group_size, False, True) is tiles
    assert choice.choose(libraries["avx512-vnni"], 512, group_size, 1152, False, True) is libraries["avx512-vnni"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_product_in_blocks(monkeypatch, dtype):
    monkeypatch.setattr(cpu_linear, "EXACT_BLOCK_ELEMENTS", 4000)
    library = native.load()
    if library is None:
        pytest.skip("no native kernel on this CPU")
    # as on a CPU with tiles
    tiles = dataclasses.replace(library, variant="amx-int8")
    monkeypatch.setattr(cpu_linear, "load", lambda: tiles)
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (90, 515), dtype=torch.int8)
    scale = (torch.rand(90, 33) + 0.1).half()
    bias = torch.randn(90)
    x = torch.randn(2, 300, 515).to(dtype)
    y = of_parts(cpu.linear_int8)(x, pack_planes(codes), scale, None, bias, in_features=515, group_size=16, dense=True)
    expected = F.linear(x.double(), codes * expand_scales(scale.double(), 16, 515), bias.double())
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert float((y.double() - expected).norm() / expected.norm()) < 4e-3  # bfloat16; int8 rows would give 7e-3


def test_prepared_calls_choose_as_the_operator_does(monkeypatch):
    from diffusers_ternary.kernels.cpu import prepared as call
    from diffusers_ternary.kernels.operands import Layout

    library = native.load()
    if library is None:
        pytest.skip("no native kernel on this CPU")
    monkeypatch.setattr(call, "load", lambda: dataclasses.replace(library, variant="amx-int8"))
    layout = Layout(64, 256, 16, torch.float16, False, None, "auto")
    device = torch.device("cpu")
    assert call.prepare(layout, torch.Size((600, 256)), torch.float32, device) is None
    wide = dataclasses.replace(layout, group_size=128)
    assert call.prepare(wide, torch.Size((600, 256)), torch.float32, device) is not None


def test_a_prepared_call_uses_the_threads_of_torch():
    from diffusers_ternary.kernels.cpu.prepared import prepare
    from diffusers_ternary.kernels.operands import Layout

    if native.load() is None:
        pytest.skip("no native kernel on this CPU")
    torch.manual_seed(0)
    x, codes = torch.randn(700, 640), torch.randint(-1, 2, (500, 640), dtype=torch.int8)
    weight, scale, bias = pack_planes(codes), (torch.rand(500, 5) + 0.1).half(), torch.randn(500)
    call = prepare(Layout(500, 640, 128, scale.dtype, False, bias.dtype, "auto"), x.shape, x.dtype, x.device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(x, weight, scale, None, bias)
        torch.set_num_threads(3)
        assert torch.equal(call(x, weight, scale, None, bias), expected)
    finally:
        torch.set_num_threads(before)
    same = of_parts(cpu.linear_int8)(x, weight, scale, None, bias, in_features=640, group_size=128)
    assert torch.equal(same, expected)
