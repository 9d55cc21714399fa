# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::linear` as torch sees it: opcheck, gradients, fake tensors, compile, export, errors."""

import math
import shutil

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusers_ternary.kernels.ops import ternary_linear, ternary_unpack
from diffusers_ternary.ternarize import TernaryWeight, ternarize


def weight_of(rows: int = 9, columns: int = 50, group_size: int = 16, layout: str = "double") -> TernaryWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return ternarize(weight, group_size=group_size, scales=layout)


def arguments(x, packed, bias=None, activation_dtype="none"):
    spec = packed.spec
    return (
        x,
        packed.packed,
        packed.scale,
        packed.multiplier,
        bias,
        spec.in_features,
        spec.group_size,
        activation_dtype,
    )


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("lead", "layout", "activation_dtype"),
    [((), "group", "none"), ((3,), "double", "auto"), ((2, 3), "group", "int8"), ((0,), "double", "float8_e4m3fn")],
)
def test_opcheck(lead, layout, activation_dtype):
    x = inputs(*lead, 50).requires_grad_()
    bias = inputs(9, seed=2).requires_grad_()
    torch.library.opcheck(ternary_linear, arguments(x, weight_of(layout=layout), bias, activation_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_in_16_bits_without_bias(dtype):
    x = inputs(3, 50, dtype=dtype).requires_grad_()
    torch.library.opcheck(ternary_linear, arguments(x, weight_of()))


@pytest.mark.parametrize("activation_dtype", ["none", "auto"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
def test_gradients_against_a_dense_float64_map(lead, activation_dtype):
    packed = weight_of()
    dense = packed.dequantize().double()
    x = inputs(*lead, 50).requires_grad_()
    bias = inputs(9, seed=2).requires_grad_()
    y = ternary_linear(*arguments(x, packed, bias, activation_dtype))
    grad = inputs(*lead, 9, seed=3)
    y.backward(grad)

    x64 = x.detach().double().requires_grad_()
    bias64 = bias.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(x64, dense, bias64)
    expected.backward(grad.double())
    # "auto" may round each activation to the nearest of 255 steps: half a step times the weights at the most.
    step = x64.abs().amax(-1, keepdim=True) / 127 if activation_dtype == "auto" else torch.zeros(1)
    bound = step / 2 * dense.abs().sum(dim=1)
    assert bool(((y.double() - expected).abs() <= bound + 1e-4).all())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation_dtype", ["int8", "float8_e4m3fn"])
def test_the_gradient_goes_straight_through_the_rounding_of_activations(activation_dtype):
    packed = weight_of()
    x = inputs(3, 50).requires_grad_()
    ternary_linear(*arguments(x, packed, None, activation_dtype)).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_inputs(bias_dtype):
    x = inputs(3, 50, dtype=torch.bfloat16).requires_grad_()
    bias = inputs(9, dtype=bias_dtype).requires_grad_()
    y = ternary_linear(*arguments(x, weight_of(), bias))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert bias.grad.dtype == bias_dtype


def test_only_wanted_gradients_are_computed():
    x = inputs(3, 50)
    bias = inputs(9).requires_grad_()
    ternary_linear(*arguments(x, weight_of(), bias)).sum().backward()
    assert x.grad is None
    assert bias.grad is not None


@pytest.mark.parametrize("lead", [(), (4,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_kernel_says_what_the_real_one_returns(lead, dtype):
    x, packed = inputs(*lead, 50, dtype=dtype), weight_of()
    real = ternary_linear(*arguments(x, packed))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ternary_linear(*arguments(mode.from_tensor(x), packed))
    assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
        real.shape,
        real.dtype,
        real.stride(),
        real.device,
    )


def test_inputs_that_are_not_contiguous():
    packed = weight_of()
    x = inputs(50, 4, 3).permute(2, 1, 0)
    expected = ternary_linear(*arguments(x.contiguous(), packed))
    assert torch.equal(ternary_linear(*arguments(x, packed)), expected)
    torch.library.opcheck(ternary_linear, arguments(x, packed))


class Product(torch.nn.Module):
    def __init__(self, packed: TernaryWeight) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.relu(ternary_linear(*arguments(x, self.packed, bias))) * 2


def test_compiles_into_one_graph_with_gradients():
    module = Product(weight_of())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    bias = inputs(9)
    for rows in (3, 5, 8):  # the second size makes the dimension dynamic
        x = inputs(rows, 50).requires_grad_()
        y = compiled(x, bias)
        torch.testing.assert_close(y, module(x, bias))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(module(x, bias).sum(), x)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPU")
def test_compiles_with_inductor():
    module = Product(weight_of())
    x, bias = inputs(3, 50), inputs(9)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x, bias), module(x, bias))


def test_exports_with_a_dynamic_batch():
    module = Product(weight_of())
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (inputs(3, 50), inputs(9)), dynamic_shapes=({0: batch}, None))
    assert any("diffusers_ternary.linear" in str(node.target) for node in exported.graph.nodes)
    x = inputs(7, 50)
    torch.testing.assert_close(exported.module()(x, inputs(9)), module(x, inputs(9)))


@pytest.mark.parametrize("columns", [49, 51, 1])
def test_a_wrong_number_of_features_is_a_readable_error(columns):
    with pytest.raises((RuntimeError, ValueError), match=rf"expected \[\.\.\., 50\], got \[3, {columns}\]"):
        ternary_linear(*arguments(inputs(3, columns), weight_of()))


def test_an_unknown_activation_dtype_is_a_readable_error():
    with pytest.raises(ValueError, match="activation_dtype='int4' is not one of auto, int8"):
        ternary_linear(*arguments(inputs(3, 50), weight_of(), None, "int4"))


@pytest.mark.parametrize("name", ["weight", "scale", "multiplier", "bias"])
def test_one_operand_on_meta_is_an_error_and_not_memory_without_values(name):
    packed = weight_of()
    names = ["input", "weight", "scale", "multiplier", "bias"]
    operands = list(arguments(inputs(3, 50), packed, inputs(9)))
    if operands[names.index(name)] is None:
        pytest.skip("this layout has no such operand")
    operands[names.index(name)] = operands[names.index(name)].to("meta")
    for operator in (ternary_linear, torch.ops.diffusers_ternary.linear_inference):
        with pytest.raises(RuntimeError, match=f"{name} is on meta and the input on cpu"):
            operator(*operands)


def test_dequantizing_with_a_scale_on_meta_is_an_error():
    packed = weight_of()
    with pytest.raises(RuntimeError, match="scale is on meta and the weight on cpu"):
        ternary_unpack(packed.packed, packed.scale.to("meta"), packed.multiplier, 50, 16, torch.float32)


@pytest.mark.parametrize("activation_dtype", ["auto", "none", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(48,), (4, 48), (2, 4, 48), (1, 1, 48)], ids=str)
def test_the_output_can_be_changed_in_place_in_training(shape, dtype, activation_dtype):
    """As that of nn.Linear: `y += x` and in-place activations are common in models."""
    torch.manual_seed(0)
    packed, bias = weight_of(16, 48), torch.randn(16, dtype=dtype)
    results = []
    for in_place in (True, False):
        x = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).requires_grad_()
        y = ternary_linear(*arguments(x, packed, bias, activation_dtype))
        y = y.mul_(2).relu_() if in_place else torch.relu(y * 2)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
