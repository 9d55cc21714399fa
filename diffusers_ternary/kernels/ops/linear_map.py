# SPDX-License-Identifier: Apache-2.0
"""The linear map as operators: schema, fake kernel, gradient, and one implementation registered per device.

`diffusers_ternary::linear` has a gradient formula and so passes through Python twice more for each call, which costs
as much host time as the products of a small model. `diffusers_ternary::linear_inference` has none.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...ternarize import rotate
from .. import blocked, cpu, reference
from ..operands import PackedWeight
from .rotate import ternary_rotate
from .schema import LINEAR, Linear, call_linear, linear_kernel
from .traced import traced_linear
from .unpack import ternary_unpack


_blocked = linear_kernel(blocked.linear)


@torch.library.custom_op("diffusers_ternary::linear", mutates_args=(), schema=LINEAR)
def ternary_linear(*arguments: Any) -> torch.Tensor:
    """`rotate(input) @ W.T + bias` with a packed ternary W.

    Args:
        input (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        activation_dtype (`str`): one of `ACTIVATION_DTYPES`.
        hadamard (`int`): block size of the rotation of the input that the codes were made for (see [`rotate`]);
            0 = none.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `input`.

    Raises:
        ValueError: if `input` has another number of features, or `activation_dtype` is unknown.
        RuntimeError: if `input` is not float, or an operand is on another device.
    """
    return _blocked(*arguments)  # serves every device without an implementation of its own


_LIBRARY = torch.library.Library("diffusers_ternary", "FRAGMENT")
_LIBRARY.define(f"linear_inference{LINEAR}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("linear_inference", _blocked, "CompositeExplicitAutograd")


def register_linear(serve: Linear, devices: Sequence[str], *, prepared: bool) -> Any:
    """Registers what serves both operators on devices, see [`linear_kernel`]; returns their implementation."""
    kernel = linear_kernel(serve, prepared=prepared)
    ternary_linear.register_kernel(devices)(kernel)
    for device in devices:
        _LIBRARY.impl("linear_inference", kernel, device.upper())
    return kernel


def _serve_cpu(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor:
    if input.dtype == torch.float64 or activation_dtype == "float8_e4m3fn":
        # Whoever asks for float64 wants exact numbers (gradient checks), not speed.
        return reference.linear(input, weight, bias, activation_dtype)
    # float32: CPUs rotate it faster than 16 bits, and the activations are rounded once.
    rotated = rotate(input.float(), weight.hadamard) if weight.hadamard else input
    if activation_dtype == "none":
        return cpu.linear_exact(rotated, weight, bias).to(input.dtype)
    return cpu.linear_int8(rotated, weight, bias, dense=activation_dtype == "auto").to(input.dtype)


register_linear(_serve_cpu, ["cpu"], prepared=True)


def _fake(input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weight.out_features)


ternary_linear.register_fake(linear_kernel(_fake))
torch.library.register_fake("diffusers_ternary::linear_inference", linear_kernel(_fake), lib=_LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, scale, multiplier, bias, in_features, group_size, _, hadamard = inputs
    ctx.save_for_backward(weight, scale, multiplier)
    ctx.in_features = in_features
    ctx.group_size = group_size
    ctx.hadamard = hadamard
    ctx.input_dtype = input.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, scale, multiplier = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        # Straight through the rounding of activations: the gradient is that of the float map.
        dense = ternary_unpack(weight, scale, multiplier, ctx.in_features, ctx.group_size, grad.dtype)
        grad_input = grad @ dense
        if ctx.hadamard:
            grad_input = ternary_rotate(grad_input, ctx.hadamard)  # R is symmetric
        grad_input = grad_input.to(ctx.input_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)  # [N]; also for a single token
    return grad_input, None, None, None, grad_bias, None, None, None, None


ternary_linear.register_autograd(_backward, setup_context=_setup_context)


def ternary_product(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor:
    """[`ternary_linear`] of a [`PackedWeight`], by the operator that serves best here.

    Where a compiled graph needs no gradient that is the one without a gradient formula.
    """
    operator: Any = ternary_linear
    if torch.compiler.is_compiling() and not _is_exporting() and not _needs_gradient(input, bias):
        y = traced_linear(input, weight, bias, activation_dtype)
        if y is not None:
            return y
        operator = torch.ops.diffusers_ternary.linear_inference
    return call_linear(operator, input, weight, bias, activation_dtype)


def _needs_gradient(input: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))


def _is_exporting() -> bool:
    """An exported program may be trained later."""
    return torch.compiler.is_exporting()
