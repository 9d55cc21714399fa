# SPDX-License-Identifier: Apache-2.0
"""Products with 8-bit weights against float64: compiled where a GPU is, under Triton's interpreter otherwise.

Without a GPU `test_interpreted.py` runs this file in a process of its own.
"""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusers_ternary.format import Int8Spec
from diffusers_ternary.layers import Int8Linear, TernaryLinear, keep_unpacked
from diffusers_ternary.ternarize import quantize_int8, rotate, ternarize
from integration_tests.support.interpreter import skip_without_interpreter


triton: Any = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    skip_without_interpreter()
elif not torch.cuda.is_available():
    pytest.skip("no GPU: run by test_interpreted.py", allow_module_level=True)

from diffusers_ternary.kernels import triton as kernels  # noqa: E402
from diffusers_ternary.kernels.ops import int8 as int8_ops  # noqa: E402
from diffusers_ternary.kernels.ops import resident as resident_ops  # noqa: E402
from diffusers_ternary.kernels.triton import devices, eight_bit, launch, plain, product  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import Plan  # noqa: E402
from diffusers_ternary.kernels.triton.trial import problem_of  # noqa: E402


DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float16, torch.float32) + (() if INTERPRETED else (torch.bfloat16,))  # interpreted bfloat16 is wrong


@pytest.fixture(autouse=True)
def _first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    for module in (product, eight_bit):
        monkeypatch.setattr(module, "tuner_of", lambda *_: None)
    devices.trials_of.cache_clear()
    yield
    devices.trials_of.cache_clear()


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = quantize_int8(torch.randn(n, k) * torch.linspace(0.1, 2, k))
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    return tuple(each.to(DEVICE) for each in (x, weight.values, weight.scale, bias))


def exact(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dense = values.double() * scale.double()
    return F.linear(x.double(), dense, None if bias is None else bias.double())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 128), (5, 37, 250), (16, 48, 256), (3, 5, 7)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation_dtype", ["auto", "none", "float8_e4m3fn"])
def test_few_rows_keep_their_activations(m, n, k, dtype, activation_dtype):
    x, values, scale, bias = operands(m, n, k, dtype)
    y = kernels.int8_linear(x.view(1, m, k), values, scale, bias, activation_dtype)
    assert (y.shape, y.dtype) == ((1, m, n), dtype)
    assert problem_of(y[0], exact(x, values, scale, bias), 1e-6 if dtype == torch.float32 else 1e-3) is None


@pytest.mark.parametrize(("n", "k", "plan"), [(48, 256, "dense"), (40, 144, "library"), (37, 128, "dense")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows_are_rounded_to_int8(n, k, plan, dtype, monkeypatch):
    served = []

    def noted(plan: Plan, *rest: Any, run: Any = eight_bit.run) -> torch.Tensor:
        served.append(plan.path)
        return run(plan, *rest)

    monkeypatch.setattr(eight_bit, "run", noted)
    x, values, scale, bias = operands(19, n, k, dtype)
    y = kernels.int8_linear(x, values, scale, bias, "int8")
    expected = exact(plain.round_activations(x, "int8"), values, scale, bias)
    assert problem_of(y, expected, 1e-3) is None
    assert {*served} == {plan}


def test_other_products_are_left_to_torch():
    x, values, scale, bias = operands(19, 37, 250, torch.float16)
    assert kernels.int8_linear(x, values, scale, bias, "none") is None
    assert kernels.int8_linear(x, values, scale, bias, "auto") is None  # too few rows to be worth rounding
    assert kernels.int8_linear(x, values, scale, bias, "int8") is None  # rows of 250 bytes, which no product takes
    assert kernels.int8_linear(x[:0], values, scale, bias, "auto") is None


@pytest.mark.parametrize("scales", ["group", "double"])
@pytest.mark.parametrize(("activation_dtype", "hadamard"), [("int8", 0), ("int8", 64)])
def test_weights_kept_unpacked_give_the_same_numbers(scales, activation_dtype, hadamard, monkeypatch):
    monkeypatch.setattr(resident_ops, "TRITON_DEVICE_TYPES", (DEVICE,))
    weight = ternarize(torch.randn(40, 250), group_size=64, scales=scales, hadamard=hadamard)
    layer = TernaryLinear.from_weight(weight, torch.randn(40), activation_dtype=activation_dtype).to(DEVICE)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    x, few = torch.randn(19, 250, device=DEVICE), torch.randn(3, 250, device=DEVICE)
    rotated = rotate(x, hadamard)
    rounded = plain.round_activations(rotated, activation_dtype)
    expected = rounded @ rotate(weight.dequantize(), hadamard).T.to(DEVICE) + layer.bias
    packed = layer(few)
    assert keep_unpacked(model, max_bytes=100) == 0
    assert keep_unpacked(model) == layer.unpacked_bytes() == 40 * (256 + 4)
    served = []
    multiply = eight_bit.multiply

    def noted(*tensors: Any) -> torch.Tensor | None:
        served.append(multiply(*tensors))
        return served[-1]

    monkeypatch.setattr(eight_bit, "multiply", noted)
    with torch.no_grad():
        y = layer(x)
        assert problem_of(y, expected, 0.02 if scales == "group" else 1e-3) is None
        assert served[0] is not None
        assert torch.equal(layer(few), packed)  # few rows take packed codes
        assert len(served) == 1
        # What was changed in place is no longer what was unpacked.
        layer.weight_scale.view(torch.float16).mul_(2)
        twice = layer(x) - layer.bias
        assert problem_of(twice, 2 * (expected - layer.bias), 0.02) is None
    assert copy.deepcopy(layer)._resident is None
    assert keep_unpacked(model) > 0
    model.to(DEVICE)
    assert layer._resident is None
    assert keep_unpacked(model) > 0
    assert keep_unpacked(model, max_bytes=0) == 0
    assert layer._resident is None
    with pytest.raises(ValueError, match="max_bytes=-1 is negative"):
        keep_unpacked(model, max_bytes=-1)


def test_a_layer_is_right_with_its_kernel_and_without(monkeypatch, caplog):
    monkeypatch.setattr(int8_ops, "TRITON_DEVICE_TYPES", (DEVICE,))
    layer = Int8Linear(Int8Spec(24, 72), activation_dtype="auto", dtype=torch.float16)
    layer.pack(torch.randn(24, 72))
    layer.bias.data.copy_(torch.randn(24))
    layer.to(DEVICE)
    x = torch.randn(2, 72, device=DEVICE).half()
    expected = exact(x, layer.weight, layer.scales, layer.bias)
    launches = []
    kernel = launch.int8_gemv
    monkeypatch.setattr(launch, "int8_gemv", lambda *tensors: launches.append(1) or kernel(*tensors))
    with torch.no_grad():
        assert problem_of(layer(x), expected, 1e-3) is None
    assert len(launches) == 2  # the trial, and the product
    assert not caplog.records

    def broken(*tensors: Any) -> torch.Tensor:
        launches.append(1)
        return kernel(*tensors) * 1.5

    devices.trials_of.cache_clear()
    monkeypatch.setattr(launch, "int8_gemv", broken)
    launches.clear()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert problem_of(layer(x), expected, 2e-3) is None
    assert len(launches) == 1
    (record,) = caplog.records
    assert "The kernel for torch.float16 rows and int8 weights does not work" in record.getMessage()
