# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::linear`: schema, fake kernel, autograd, and one implementation registered per device."""

from typing import Any

import torch

from ...ternarize import rotate
from .. import blocked, cpu, reference
from ..compat import returns_no_view
from .checks import check_devices, check_float
from .prepared import quick_linear
from .rotate import ternary_rotate
from .unpack import ternary_dequantize


ACTIVATION_DTYPES = ("auto", "int8", "float8_e4m3fn", "none")


def check_arguments(
    input: torch.Tensor,
    operands: tuple[torch.Tensor | None, ...],
    in_features: int,
    activation_dtype: str,
) -> None:
    """Checks what a caller can get wrong; every device's implementation calls it first.

    Args:
        input (`torch.Tensor`): the activations.
        operands (`tuple`): weight, scale, multiplier and bias.
        in_features (`int`): K.
        activation_dtype (`str`): one of `ACTIVATION_DTYPES`.

    Raises:
        ValueError: names the value and what is expected.
        RuntimeError: for an input that is not float, or an operand on another device.
    """
    check_float(input)
    check_devices(
        input.device, "the input", weight=operands[0], scale=operands[1], multiplier=operands[2], bias=operands[3]
    )
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(f"A ternary linear map expected [..., {in_features}], got {list(input.shape)}.")
    if activation_dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype={activation_dtype!r} is not one of {', '.join(ACTIVATION_DTYPES)}.")


@torch.library.custom_op("diffusers_ternary::linear", mutates_args=())
def ternary_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
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
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    # The default implementation serves every device without one of its own.
    return blocked.linear(
        input,
        weight,
        scale,
        multiplier,
        bias,
        in_features=in_features,
        group_size=group_size,
        activation_dtype=activation_dtype,
        hadamard=hadamard,
    )


@ternary_linear.register_kernel("cpu")
@returns_no_view
def _linear_cpu(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
    quick = quick_linear(input, weight, scale, multiplier, bias, in_features, group_size, activation_dtype, hadamard)
    if quick is not None:
        return quick
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    packed = (weight, scale, multiplier, bias)
    if input.dtype == torch.float64 or activation_dtype == "float8_e4m3fn":
        # Whoever asks for float64 wants exact numbers (gradient checks), not speed.
        exact = "none" if activation_dtype == "auto" else activation_dtype
        return reference.linear(
            input,
            *packed,
            in_features=in_features,
            group_size=group_size,
            activation_dtype=exact,
            hadamard=hadamard,
        )
    # float32: CPUs rotate it faster than 16 bits, and the activations are rounded once.
    rotated = rotate(input.float(), hadamard) if hadamard else input
    if activation_dtype == "none":
        out = cpu.linear_exact(rotated, *packed, in_features=in_features, group_size=group_size)
    else:
        dense = activation_dtype == "auto"
        out = cpu.linear_int8(rotated, *packed, in_features=in_features, group_size=group_size, dense=dense)
    return out.to(input.dtype)


@ternary_linear.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    return input.new_empty(*input.shape[:-1], weight.shape[0])


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
        dense = ternary_dequantize(weight, scale, multiplier, ctx.in_features, ctx.group_size, grad.dtype)
        grad_input = grad @ dense
        if ctx.hadamard:
            grad_input = ternary_rotate(grad_input, ctx.hadamard)  # R is symmetric
        grad_input = grad_input.to(ctx.input_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)  # [N]; also for a single token
    return grad_input, None, None, None, grad_bias, None, None, None, None


ternary_linear.register_autograd(_backward, setup_context=_setup_context)
