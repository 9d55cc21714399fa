# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for packed ternary weights (CUDA, ROCm, XPU). Triton is imported at the first call.

The folder needs torch and Triton, and nothing else of this package: its files can be published as they are.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch

from .weights import FLOAT_DTYPES, Layout, PackedWeight


__all__ = [
    "MAX_HADAMARD",
    "Layout",
    "PackedWeight",
    "dequantize",
    "int8_linear",
    "library_dtype",
    "linear",
    "prepare",
    "rotate",
    "served_activation_dtype",
    "unavailable_reason",
    "unpack_8bit",
    "unpacked",
]

MAX_HADAMARD = 16384  # a block that is rotated stays in the registers of one program


@functools.cache
def unavailable_reason(device_type: str, index: int = 0) -> str | None:
    """Why the kernels cannot serve a device; `None` where they can. Asked once, with a launch of a tiny kernel."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from .devices import target_of

        target = target_of(device_type, index)
    except Exception as error:  # a Triton of another version, or a driver that does not start
        return f"Triton does not start ({type(error).__name__}: {error})"
    if target is None:
        return f"Triton has no backend for {device_type}"
    if not target.supported:
        return f"compute capability {target.arch} is below 80"
    return _failure_of_a_kernel(torch.device(device_type, index))


def _failure_of_a_kernel(device: torch.device) -> str | None:
    """Compiles and launches one kernel: without a C compiler, for one, Triton imports and then fails."""
    from .devices import current
    from .launch import derive_multipliers

    try:
        with current(device):
            ones = torch.ones(1, 1, dtype=torch.float16, device=device)
            derive_multipliers(PackedWeight(ones.to(torch.int8), ones, None, 4, 4))
    except Exception as error:  # of every kind: compilers, linkers and drivers raise their own
        return f"a first kernel failed ({type(error).__name__}: {error})"
    return None


def served_activation_dtype(device_type: str, index: int, activation_dtype: str) -> str:
    """What a large product gets where `activation_dtype` is asked for: `"none"`, `"int8"` or `"float8_e4m3fn"`."""
    from .devices import target_of
    from .dispatch import Request, resolve_activation_dtype

    target = target_of(device_type, index)
    if target is None:
        raise RuntimeError(f"Triton has no backend for {device_type}.")
    return resolve_activation_dtype(target, Request(4096, 4096, 4096, 128, False, torch.bfloat16, activation_dtype))


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str) -> torch.Tensor:
    """`rotate(x) @ W.T + bias` with packed ternary W, on a device that [`unavailable_reason`] has nothing against.

    Args:
        x (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        weight ([`PackedWeight`]): W; it is rotated in blocks of at most `MAX_HADAMARD`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        activation_dtype (`str`): `"auto"`, `"none"`, `"int8"` or `"float8_e4m3fn"`.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`. With 8-bit activations the scales of groups are integers of 1..63
        times a row scale: exact for the `"double"` layout in int8, within 1/126 of the row's largest scale for the
        `"group"` layout; in float8 those that multiply codes are rounded to four significant bits (at most 1/16).

    Raises:
        RuntimeError: if Triton cannot serve the device of `x`.
    """
    from .product import multiply

    return multiply(x, _operand(weight), bias, activation_dtype)


def prepare(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, layout: Layout
) -> Callable[..., torch.Tensor] | None:
    """[`linear`] for inputs of one shape, with as little host time as can be; `None` where `linear` must be called.

    Args:
        shape, dtype, device: of `x`, not empty.
        layout ([`Layout`]): of the weight.

    Returns:
        A function of `(x, weight, scale, multiplier, bias)`, see [`PreparedCall`]. It holds no tensor.
    """
    if dtype not in FLOAT_DTYPES or layout.hadamard > MAX_HADAMARD:
        return None
    from .prepared import PreparedCall

    return PreparedCall(shape, device, layout)


def unpacked(
    weight: PackedWeight, activation_dtype: str
) -> Callable[[torch.Tensor, torch.Tensor | None, str], torch.Tensor | None] | None:
    """[`linear`] with the weight unpacked to 8 bits once, which takes 4 times the memory; arguments as there.

    Returns:
        A function of `(x, bias, activation_dtype)` that holds the unpacked weight and returns `None` where [`linear`]
        must be called (few rows, activations that are not rounded); or `None` where there are no 8-bit products.
    """
    if weight.hadamard > MAX_HADAMARD:
        return None
    from . import eight_bit

    dense = eight_bit.unpacked(_operand(weight), activation_dtype)
    return None if dense is None else lambda x, bias, asked: eight_bit.linear(x, dense, bias, asked)


def int8_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """`x @ (values * scale).T + bias`, or `None` where no kernel serves; see [`eight_bit.int8_linear`]."""
    from . import eight_bit

    return eight_bit.int8_linear(x, values, scale, bias, activation_dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Dense weight `[N, K]`, codes times scales rounded once to `dtype`; not rotated back."""
    from . import product
    from .devices import current

    with current(weight.packed.device):
        return product.dequantize(_operand(weight), dtype)


def unpack_8bit(weight: PackedWeight, activation_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as operand of an 8-bit product; arguments as in [`linear`].

    Returns:
        `[N, K']` of the activation dtype, K' = K rounded up to 16, zero past K, and float32 scales of rows `[N]`.
    """
    from . import product
    from .devices import current

    with current(weight.packed.device):
        values, row_scale = product.unpack(_operand(weight), activation_dtype)
    return values.view(getattr(torch, activation_dtype)), row_scale


def library_dtype(device: torch.device, dtype: torch.dtype, layout: Layout) -> str | None:
    """The 8-bit dtype in which the vendor's product serves many rows of a layer; `None` if it does not, or is wrong.

    The first question of a kind launches kernels.

    Args:
        device, dtype: of the activations.
        layout ([`Layout`]): of the weight.
    """
    from . import product
    from .devices import current

    with current(device):
        n, groups = layout.out_features, layout.groups
        # Nothing is read of these: a trial draws its own values.
        weight = PackedWeight(
            torch.empty(n, -(-layout.in_features // 4), dtype=torch.int8, device=device),
            torch.empty(n, 1 if layout.has_multiplier else groups, dtype=layout.scale_dtype, device=device),
            torch.empty(n, groups, dtype=torch.int8, device=device) if layout.has_multiplier else None,
            layout.in_features,
            layout.group_size,
        )
        return product.library_dtype(weight, dtype, layout.activation_dtype)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R` for x `[..., K]`, R = H / sqrt(block) on each whole block of columns; rounded once to the dtype of x."""
    from . import product
    from .devices import current

    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.empty_like(x)
    with current(x.device):
        return product.rotate(rows.contiguous(), block).view(x.shape)


def _operand(weight: PackedWeight) -> PackedWeight:
    """The weight as kernels read it: contiguous, multipliers as int8."""
    weight = weight.contiguous()
    if weight.multiplier is None:
        return weight
    return dataclasses.replace(weight, multiplier=weight.multiplier.view(torch.int8))
