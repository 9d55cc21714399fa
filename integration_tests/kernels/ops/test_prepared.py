# SPDX-License-Identifier: Apache-2.0
"""Prepared calls: the quick way of layers past the dispatcher returns what the operator returns, or is not taken."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ternary.kernels.cpu.native import load
from diffusers_ternary.kernels.operands import Layout
from diffusers_ternary.kernels.ops import prepared, prepared_products, ternary_linear
from diffusers_ternary.layers import TernaryLinear
from diffusers_ternary.layers import ternary as ternary_layers
from diffusers_ternary.ternarize import ternarize


N, K, GROUP = 24, 50, 16
needs_library = pytest.mark.skipif(load() is None, reason="the CPU library is not compiled: the operator serves")


def layer_of(*, bias: bool = True, scales: str = "double", seed: int = 0, **options: object) -> TernaryLinear:
    generator = torch.Generator().manual_seed(seed)
    packed = ternarize(torch.randn(N, K, generator=generator), group_size=GROUP, scales=scales)
    return TernaryLinear.from_weight(packed, torch.randn(N, generator=generator) if bias else None, **options)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_operator(layer: TernaryLinear, x: torch.Tensor) -> torch.Tensor:
    """The differentiable operator with the quick way closed."""
    spec = layer.spec
    tensors = (layer.weight, layer.scales, layer.weight_multiplier, layer.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers_ternary.kernels.ops.schema.quick_linear", lambda *_: None)
        return ternary_linear(
            x, *tensors, spec.in_features, spec.group_size, layer.activation_dtype, spec.hadamard
        ).detach()


class Operators(TorchDispatchMode):
    """Lists the operators of this package that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "diffusers_ternary":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def quick(monkeypatch) -> list[bool]:
    """For each call of a layer, whether it went past the dispatcher."""
    served: list[bool] = []
    multiply, by_operator = TernaryLinear.multiply_rows, ternary_layers.ternary_product

    def call(self, x):
        served.append(True)
        return multiply(self, x)

    def operator(*arguments):
        served[-1] = False
        return by_operator(*arguments)

    monkeypatch.setattr(TernaryLinear, "multiply_rows", call)
    monkeypatch.setattr(ternary_layers, "ternary_product", operator)
    return served


@pytest.mark.parametrize("activation_dtype", ["auto", "int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("scales", "bias"), [("double", True), ("group", False)])
def test_equals_the_operator(activation_dtype, dtype, scales, bias):
    layer = layer_of(bias=bias, scales=scales, activation_dtype=activation_dtype)
    for shape in ((K,), (1, K), (5, K), (2, 3, K), (0, K)):
        x = inputs(*shape, dtype=dtype)
        y = layer(x)
        assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)
        assert torch.equal(y, by_operator(layer, x))


@needs_library
def test_serves_plain_calls(quick):
    layer = layer_of(activation_dtype="int8")
    for x in (inputs(3, K), inputs(3, K, dtype=torch.bfloat16), inputs(K, 3).T):
        assert torch.equal(layer(x), by_operator(layer, x))
    assert quick == [True] * 3


def test_rows_with_an_infinity_are_exact_and_with_nan_are_nan():
    layer = layer_of(activation_dtype="int8")
    x = inputs(4, K)
    x[1, 2], x[2, 3] = float("inf"), float("nan")
    y = layer(x)
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, False, True]))
    torch.testing.assert_close(y, by_operator(layer, x), equal_nan=True, rtol=0, atol=0)


def test_watchers_and_transforms_get_the_operator(quick):
    layer, x = layer_of(activation_dtype="int8"), inputs(3, K)
    with Operators() as operators:
        layer(x)
    assert operators.seen == ["linear.default"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, N)
    assert torch.equal(torch.vmap(layer)(x), by_operator(layer, x))
    assert quick == [False] * 3


@needs_library
def test_gradients_are_recorded(quick):
    layer = layer_of(activation_dtype="int8")
    x = inputs(3, K).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((N,), 3.0))
    assert quick == [False, False]
    with torch.no_grad():  # as pipelines run, whose biases require gradients
        assert not layer(x).requires_grad
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer(x.detach())
    assert quick == [False, False, True, True, True]


def change_bias_dtype(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.to(torch.bfloat16)


def change_activations(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.activation_dtype = "none"


def install_another_layout(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.install_weight(ternarize(torch.randn(N, K), group_size=GROUP, scales="group"))


def replace_parameters(layer: TernaryLinear, other: TernaryLinear) -> None:
    for name, parameter in list(other.named_parameters()):
        setattr(layer, name, torch.nn.Parameter(parameter.data.clone(), requires_grad=False))


def swap_data(layer: TernaryLinear, other: TernaryLinear) -> None:
    for name, parameter in other.named_parameters():
        getattr(layer, name).data = parameter.data.clone()


def load_state_dict(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def load_in_place(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.load_state_dict(other.state_dict())


def fuse(layer: TernaryLinear, other: TernaryLinear) -> None:
    layer.fuse(torch.randn(N, K))
    layer.unfuse()


CHANGES = (
    change_bias_dtype,
    change_activations,
    install_another_layout,
    replace_parameters,
    swap_data,
    load_state_dict,
    load_in_place,
    fuse,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_stale_after(change):
    layer, x = layer_of(activation_dtype="int8"), inputs(3, K)
    before = layer(x)
    change(layer, layer_of(activation_dtype="int8", seed=5))
    y = layer(x)
    assert torch.equal(y, by_operator(layer, x))
    assert torch.equal(y, before) == (change is fuse)


def test_no_tensor_is_kept_alive():
    """Offloading frees a device's memory by replacing parameters: nothing else may hold them."""
    layer = layer_of(activation_dtype="int8")
    layer(inputs(3, K))
    held = [weakref.ref(parameter) for parameter in layer.parameters()]
    for name in dict(layer.named_parameters()):
        layer._parameters[name] = None
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


@needs_library
def test_tensors_that_do_not_fit_are_errors_and_never_read_past_their_end(quick):
    layer, x = layer_of(activation_dtype="int8"), inputs(3, K)
    layer(x)
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.data[: N // 2].clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight_?|scale"):
        layer(x)
    layer.weight = weight
    layer.bias = torch.nn.Parameter(torch.zeros(N - 1), requires_grad=False)
    with pytest.raises(ValueError, match=rf"bias is torch.float32 \[{N - 1}\]"):
        layer(x)
    layer.bias = None
    layer.weight = torch.nn.Parameter(weight.data.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="weight is on meta and the input on cpu"):
        layer(x)
    assert quick == [True, False, False, False]


def test_a_wrong_number_of_features_is_a_readable_error():
    with pytest.raises((RuntimeError, ValueError), match=rf"expected \[\.\.\., {K}\], got \[3, {K - 1}\]"):
        layer_of()(inputs(3, K - 1))


def test_copies_and_pickles_leave_compiled_code_behind():
    layer, x = layer_of(activation_dtype="int8"), inputs(3, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


def test_layers_of_one_layout_share_their_calls():
    a, b = layer_of(activation_dtype="int8"), layer_of(activation_dtype="int8", seed=3)
    for layer in (a, b):
        layer(inputs(3, K))
    assert a._prepared is b._prepared


def test_ever_new_shapes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(prepared, "MAX_CALLS", 4)
    layer = layer_of(activation_dtype="int8")
    for rows in range(1, 20):
        assert torch.equal(layer(inputs(rows, K)), by_operator(layer, inputs(rows, K)))
    assert len(layer._prepared.calls) <= 4


def test_a_layout_says_what_fits():
    layout = Layout(N, K, GROUP, torch.float16, True, None, "int8")
    cpu = torch.device("cpu")
    layer = layer_of(bias=False)
    good = (layer.weight, layer.weight_scale, layer.weight_multiplier, None)
    assert layout.fits(cpu, *good)
    assert layout.fits(cpu, layer.weight, layer.scales, layer.weight_multiplier, None)
    assert not layout.fits(torch.device("cuda", 0), *good)
    assert not layout.fits(cpu, layer.weight, layer.weight_scale, None, None)
    assert not layout.fits(cpu, *good[:3], torch.zeros(N))
    assert not layout.fits(cpu, layer.weight.T.contiguous().T, *good[1:])
    assert not layout.fits(cpu, layer.weight, layer.weight_scale[:1], *good[2:])
    assert prepared_products(layout) is prepared_products(Layout(N, K, GROUP, torch.float16, True, None, "int8"))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(K)
        self.a, self.b = layer_of(activation_dtype="int8"), layer_of(bias=False, activation_dtype="int8", seed=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.a(x) + self.b(x)


def test_compiled_graphs_call_the_operator_without_a_gradient_formula_unless_one_is_needed():
    graphs: list[list[str]] = []

    def backend(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes if "ternary" in str(node.target)])
        return module.forward

    block, x = Block(), inputs(3, K)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x + 0), expected)
    assert graphs == [["diffusers_ternary.linear_inference"] * 2]
    y = compiled(x)
    assert len(graphs) == 2
    assert all("linear_inference" not in name for name in graphs[1])
    y.sum().backward()
    assert block.norm.weight.grad is not None


def test_compiled_layers_do_not_recompile_for_their_prepared_calls():
    block = Block()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 4, 9):
            block(inputs(rows, K))  # eager calls in between change what is prepared
            torch.testing.assert_close(compiled(inputs(rows, K)), block(inputs(rows, K)))


def test_the_operator_passes_opcheck():
    layer = layer_of(activation_dtype="int8")
    operator = torch.ops.diffusers_ternary.linear_inference.default
    tensors = (layer.weight.data, layer.scales, layer.weight_multiplier.data, layer.bias.data)
    torch.library.opcheck(operator, (inputs(3, K), *tensors, K, GROUP, "int8", 0))
