# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for packed ternary weights (CUDA, ROCm, XPU). Triton is imported at the first call.

The folder needs torch and Triton, and nothing else of this package: its files can be published as they are.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch

from .weights import PackedWeight


__all__ = [
    "MAX_HADAMARD",
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
            derive_multipliers(_packed_weight(ones.to(torch.int8), ones, None, 4, 4))
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


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
    """`rotate(x) @ W.T + bias` with packed ternary W, on a device that [`unavailable_reason`] has nothing against.

    Args:
        x (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        activation_dtype (`str`): `"auto"`, `"none"`, `"int8"` or `"float8_e4m3fn"`.
        hadamard (`int`): block size of the rotation of x, a power of two of at most `MAX_HADAMARD`; 0 = none.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`. With 8-bit activations the scales of groups are integers of 1..63
        times a row scale: exact for the `"double"` layout in int8, within 1/126 of the row's largest scale for the
        `"group"` layout; in float8 those that multiply codes are rounded to four significant bits (at most 1/16).

    Raises:
        RuntimeError: if Triton cannot serve the device of `x`.
    """
    from .product import multiply

    packed = _packed_weight(weight, scale, multiplier, in_features, group_size, hadamard)
    return multiply(x, packed, bias, activation_dtype)


def prepare(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    out_features: int,
    in_features: int,
    group_size: int,
    scale_dtype: torch.dtype,
    activation_dtype: str,
    hadamard: int,
) -> Callable[..., torch.Tensor] | None:
    """[`linear`] for inputs of one shape, with as little host time as can be; `None` where `linear` must be called.

    Args:
        shape, dtype, device: of `x`, not empty.
        out_features (`int`): N.
        scale_dtype (`torch.dtype`): of the scales.
        in_features, group_size, activation_dtype, hadamard: as in [`linear`].

    Returns:
        A function of `(x, weight, scale, multiplier, bias)`, see [`PreparedCall`]. It holds no tensor.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or hadamard > MAX_HADAMARD:
        return None
    from .prepared import PreparedCall

    return PreparedCall(
        shape,
        device,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        scale_dtype=scale_dtype,
        activation_dtype=activation_dtype,
        hadamard=hadamard,
    )


def unpacked(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> Callable[[torch.Tensor, torch.Tensor | None, str], torch.Tensor | None] | None:
    """[`linear`] with the weight unpacked to 8 bits once, which takes 4 times the memory; arguments as there.

    Returns:
        A function of `(x, bias, activation_dtype)` that holds the unpacked weight and returns `None` where [`linear`]
        must be called (few rows, activations that are not rounded); or `None` where there are no 8-bit products.
    """
    if hadamard > MAX_HADAMARD:
        return None
    from . import eight_bit

    packed = _packed_weight(weight, scale, multiplier, in_features, group_size, hadamard)
    dense = eight_bit.unpacked(packed, activation_dtype)
    return None if dense is None else lambda x, bias, asked: eight_bit.linear(x, dense, bias, asked)


def int8_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """`x @ (values * scale).T + bias`, or `None` where no kernel serves; see [`eight_bit.int8_linear`]."""
    from . import eight_bit

    return eight_bit.int8_linear(x, values, scale, bias, activation_dtype)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense weight `[N, K]`, codes times scales rounded once to `dtype`; arguments as in [`linear`]."""
    from . import product
    from .devices import current

    packed = _packed_weight(weight, scale, multiplier, in_features, group_size)
    with current(weight.device):
        return product.dequantize(packed, dtype)


def unpack_8bit(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    activation_dtype: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as operand of an 8-bit product; arguments as in [`linear`].

    Returns:
        `[N, K']` of the activation dtype, K' = K rounded up to 16, zero past K, and float32 scales of rows `[N]`.
    """
    from . import product
    from .devices import current

    packed = _packed_weight(weight, scale, multiplier, in_features, group_size)
    with current(weight.device):
        values, row_scale = product.unpack(packed, activation_dtype)
    return values.view(getattr(torch, activation_dtype)), row_scale


def library_dtype(
    device: torch.device,
    out_features: int,
    in_features: int,
    group_size: int,
    scale_dtype: torch.dtype,
    has_multiplier: bool,
    dtype: torch.dtype,
    activation_dtype: str,
) -> str | None:
    """The 8-bit dtype in which the vendor's product serves many rows of a layer; `None` if it does not, or is wrong.

    The first question of a kind launches kernels.
    """
    from . import product
    from .devices import current

    with current(device):
        width, groups = -(-in_features // 4), -(-in_features // group_size)
        columns = 1 if has_multiplier else groups
        # Nothing is read of these: a trial draws its own values.
        packed = _packed_weight(
            torch.empty(out_features, width, dtype=torch.int8, device=device),
            torch.empty(out_features, columns, dtype=scale_dtype, device=device),
            torch.empty(out_features, groups, dtype=torch.uint8, device=device) if has_multiplier else None,
            in_features,
            group_size,
        )
        return product.library_dtype(packed, dtype, activation_dtype)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R` for x `[..., K]`, R = H / sqrt(block) on each whole block of columns; rounded once to the dtype of x."""
    from . import product
    from .devices import current

    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.empty_like(x)
    with current(x.device):
        return product.rotate(rows.contiguous(), block).view(x.shape)


def _packed_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    hadamard: int = 0,
) -> PackedWeight:
    return PackedWeight(
        weight.contiguous(),
        scale.contiguous(),
        None if multiplier is None else multiplier.contiguous().view(torch.int8),
        in_features,
        group_size,
        hadamard,
    )
