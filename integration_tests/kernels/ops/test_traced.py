# SPDX-License-Identifier: Apache-2.0
"""What a compiler sees of ternary layers on a GPU: plain operators for many rows, on fake tensors of device "cuda".

The operators themselves run on the CPU, against a dense float32 product.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

from diffusers_ternary.kernels.ops import traced
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.ternarize import TernaryWeight, ternarize


N, K = 48, 64
EIGHT_BITS = ("int8", "float8_e4m3fn")


def weight_of(layout: str = "double", group_size: int | None = 16, hadamard: int = 0, k: int = K) -> TernaryWeight:
    dense = torch.randn(N, k, generator=torch.Generator().manual_seed(0))
    return ternarize(dense, group_size=group_size, scales=layout, hadamard=hadamard)


class Attention(torch.nn.Module):
    """The layers that share an input, behind a norm."""

    def __init__(self, hadamard: int = 0) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(K)
        packed = [weight_of(hadamard=hadamard) for _ in range(3)]
        self.q, self.k, self.v = (
            TernaryLinear.from_weight(each, torch.randn(N), activation_dtype="auto") for each in packed
        )

    def forward(self, x: torch.Tensor, changed: bool = False) -> torch.Tensor:
        x = self.norm(x)
        q = self.q(x)
        if changed:
            x = x.add_(1)
        return q * self.k(x) + self.v(x)


def front_end_on_cuda(monkeypatch, rows: int, eight: str | None) -> list[str]:
    """The operators that `torch.compile`'s front end finds, on fake tensors of device "cuda"."""
    monkeypatch.setattr(traced, "_library_dtype", lambda *_: eight)
    # An export for training would keep the operator that has a gradient.
    monkeypatch.setattr("diffusers_ternary.kernels.ops.linear_map._is_exporting", lambda: False)
    mode, module = FakeTensorMode(), Attention()
    with mode:
        for child in module.modules():
            for name, parameter in list(child.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                setattr(child, name, torch.nn.Parameter(fake, requires_grad=False))
        x = torch.empty(2, rows // 2, K, device="cuda")
    program = torch.export.export(module, (x,), strict=True)
    (output,) = (node.args[0][0] for node in program.graph.nodes if node.op == "output")
    value = output.meta["val"]
    assert (tuple(value.shape), value.dtype, value.device.type) == ((2, rows // 2, N), torch.float32, "cuda")
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def lowered(monkeypatch, module: torch.nn.Module, x: torch.Tensor, eight: str, *arguments: object) -> list[str]:
    """The operators that a compiler gets: functional, lowered, without gradients.

    Torch without CUDA cannot make functional tensors of that device, so the CPU plays the GPU here.
    """
    monkeypatch.setattr(traced, "_library_dtype", lambda *_: eight)
    monkeypatch.setattr(traced, "TRITON_DEVICE_TYPES", ("cpu",))
    calls: list[str] = []

    def compiler(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    with torch.no_grad():
        y, expected = compiled(x, *arguments), module(x, *arguments)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.abs().amax()))
    return calls


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_many_rows_are_plain_operators_for_the_compiler(monkeypatch, eight):
    calls = front_end_on_cuda(monkeypatch, 2048, eight)
    assert calls.count("aten._int_mm.default" if eight == "int8" else "aten._scaled_mm.default") == 3
    own = {call for call in calls if call.startswith("diffusers_ternary")}
    # What is left of `quantize` steps aside when the graph is lowered.
    assert own <= {"diffusers_ternary.unpack_8bit.default", "diffusers_ternary.quantize.default"}
    assert calls.count("diffusers_ternary.unpack_8bit.default") == 3


@pytest.mark.parametrize(("rows", "eight"), [(64, "int8"), (2048, None)])
def test_few_rows_and_devices_without_a_product_keep_the_fused_operator(monkeypatch, rows, eight):
    calls = front_end_on_cuda(monkeypatch, rows, eight)
    assert calls.count("diffusers_ternary.linear_inference.default") == 3
    assert "diffusers_ternary.unpack_8bit.default" not in calls


@pytest.mark.parametrize("hadamard", [0, 16])
def test_activations_are_rounded_once_for_q_k_and_v_in_operators_that_fuse(monkeypatch, hadamard):
    calls = lowered(monkeypatch, Attention(hadamard), torch.randn(2, 1024, K), "int8")
    assert calls.count("aten._int_mm.default") == 3
    assert calls.count("diffusers_ternary.unpack_8bit.default") == 3
    assert calls.count("aten.amax.default") == calls.count("aten.round.default") == 1
    assert {call for call in calls if call.startswith("diffusers_ternary")} == {
        "diffusers_ternary.unpack_8bit.default"
    }


def test_a_change_in_place_is_seen(monkeypatch):
    calls = lowered(monkeypatch, Attention(), torch.randn(2, 1024, K), "int8", True)
    assert calls.count("aten.amax.default") == 2


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("k", [64, 70])
@pytest.mark.parametrize(("layout", "group_size"), [("double", 16), ("group", 20), ("group", None)])
def test_operands_multiply_to_the_dense_product(eight, k, layout, group_size):
    w = weight_of(layout, group_size, k=k)
    x = torch.randn(2, 9, k) * torch.logspace(-3, 3, 9)[:, None]
    values, row_scale = torch.ops.diffusers_ternary.unpack_8bit(
        w.packed, w.scale, w.multiplier, k, w.spec.group_size, eight
    )
    codes, token_scale = torch.ops.diffusers_ternary.quantize(x, eight, 0)
    padded = -(-k // 16) * 16
    assert (values.shape, codes.shape, token_scale.shape) == ((N, padded), (2, 9, padded), (2, 9, 1))
    assert values.dtype == codes.dtype == getattr(torch, eight)
    assert not values.view(torch.int8)[:, k:].any()
    assert not codes.view(torch.int8)[..., k:].any()
    dense = (values.float() * row_scale[:, None])[:, :k]
    exact = w.dequantize()
    # Multipliers of the "group" layout are rounded to 1/63 of the row's largest scale, in float8 to four bits as well.
    largest = exact.abs().amax(1, keepdim=True)
    step = 0.0 if group_size is None else 1 / 126 if eight == "int8" else 1 / 16
    if layout == "double" and eight == "int8":
        step = 1e-3  # float16 rounding of the stored product
    assert bool(((dense - exact).abs() <= step * largest + 1e-6).all())
    rounded = (codes.float() * token_scale)[..., :k]
    bound = x.abs().amax(-1, keepdim=True) * (0.5 / 127 if eight == "int8" else 1 / 16)
    assert bool(((rounded - x).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_tokens_of_zeros_stay_zero_and_those_that_are_not_finite_become_nan(eight):
    x = torch.randn(4, K)
    x[0], x[1, 3], x[2, 5] = 0, float("inf"), float("nan")
    codes, scale = torch.ops.diffusers_ternary.quantize(x, eight, 0)
    product = codes.float() * scale
    assert torch.equal(product[0], torch.zeros(K))
    assert bool(product[1:3].isnan().all())
    assert bool(product[3].isfinite().all())


def test_rotated_inputs():
    x = torch.randn(3, 70)
    from diffusers_ternary.ternarize import rotate

    codes, scale = torch.ops.diffusers_ternary.quantize(x, "int8", 32)
    expected, expected_scale = torch.ops.diffusers_ternary.quantize(rotate(x, 32), "int8", 0)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


def test_nothing_is_remembered_of_real_tensors():
    x = torch.randn(3, K)
    first = torch.ops.diffusers_ternary.quantize(x, "int8", 0)
    x.mul_(2)
    torch.testing.assert_close(torch.ops.diffusers_ternary.quantize(x, "int8", 0)[1], first[1] * 2)
    assert not x.__dict__


def test_unpack_passes_opcheck():
    w = weight_of()
    operator = torch.ops.diffusers_ternary.unpack_8bit.default
    torch.library.opcheck(operator, (w.packed, w.scale, w.multiplier, K, 16, "int8"))


def test_the_cpu_keeps_its_operator():
    calls: list[str] = []

    def compiler(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    module = Attention()
    x = torch.randn(2, 1024, K)
    with torch.no_grad():
        compiled = torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
    assert calls.count("diffusers_ternary.linear_inference.default") == 3
