# SPDX-License-Identifier: Apache-2.0
"""Between the flat arguments that operators of torch take and [`PackedWeight`]: the only place that knows both."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..compat import returns_no_view
from ..operands import PackedWeight
from .checks import check_devices, check_float
from .prepared import quick_linear


ACTIVATION_DTYPES = ("auto", "int8", "float8_e4m3fn", "none")
_WEIGHT = "Tensor weight, Tensor scale, Tensor? multiplier"
LINEAR = (
    f"(Tensor input, {_WEIGHT}, Tensor? bias, SymInt in_features, SymInt group_size, str activation_dtype,"
    " SymInt hadamard=0) -> Tensor"
)
UNPACK_8BIT = f"({_WEIGHT}, SymInt in_features, SymInt group_size, str dtype) -> (Tensor, Tensor)"

T = TypeVar("T")
D = TypeVar("D")
Linear = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, str], torch.Tensor]


def linear_kernel(serve: Linear, *, prepared: bool = False) -> Callable[..., torch.Tensor]:
    """An implementation of the operators with the schema `LINEAR`; what a caller can get wrong is checked first.

    Args:
        serve (`Callable`): of input, weight, bias and activation dtype.
        prepared (`bool`): whether prepared calls may serve in its place.
    """

    @returns_no_view
    def kernel(
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
        packed = PackedWeight(weight, scale, multiplier, in_features, group_size, hadamard)
        quick = quick_linear(input, packed, bias, activation_dtype) if prepared else None
        if quick is not None:
            return quick
        check_arguments(input, packed, bias, activation_dtype)
        return serve(input, packed, bias, activation_dtype)

    return kernel


def call_linear(
    operator: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_dtype: str,
) -> torch.Tensor:
    """Calls an operator with the schema `LINEAR`."""
    return operator(
        input, *weight.tensors, bias, weight.in_features, weight.group_size, activation_dtype, weight.hadamard
    )


def weight_kernel(serve: Callable[[PackedWeight, D], T]) -> Callable[..., T]:
    """An implementation of an operator on a weight alone and a dtype, for instance with the schema `UNPACK_8BIT`."""

    def kernel(
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        in_features: int,
        group_size: int,
        dtype: D,
    ) -> T:
        check_devices(weight.device, "the weight", scale=scale, multiplier=multiplier)
        return serve(PackedWeight(weight, scale, multiplier, in_features, group_size), dtype)

    return kernel


def call_unpack(operator: Callable[..., T], weight: PackedWeight, dtype: object) -> T:
    """Calls an operator on a weight alone and a dtype."""
    return operator(*weight.tensors, weight.in_features, weight.group_size, dtype)


def check_arguments(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> None:
    """Checks what a caller can get wrong.

    Raises:
        ValueError: names the value and what is expected.
        RuntimeError: for an input that is not float, or an operand on another device.
    """
    check_float(input)
    operands = {"weight": weight.packed, "scale": weight.scale, "multiplier": weight.multiplier, "bias": bias}
    check_devices(input.device, "the input", **operands)
    if input.dim() == 0 or input.shape[-1] != weight.in_features:
        raise ValueError(f"A ternary linear map expected [..., {weight.in_features}], got {list(input.shape)}.")
    if activation_dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype={activation_dtype!r} is not one of {', '.join(ACTIVATION_DTYPES)}.")
