# SPDX-License-Identifier: Apache-2.0
"""The linear map as operators that a compiler sees through: for graphs on GPUs, many rows, 8-bit activations.

One opaque operator hides the rounding of activations, which then cannot fuse with the LayerNorm or GELU before it and
happens again for each of q, k and v. Here it is plain torch, the weight is unpacked by an operator of its own, and the
product is torch's. Few rows are served by the fused kernels, which read a quarter of the bytes.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from ...ternarize import rotate
from .. import reference
from ..compat import constant_when_traced
from ..operands import Layout, PackedWeight
from .schema import UNPACK_8BIT, call_unpack, weight_kernel
from .serving import TRITON_DEVICE_TYPES, triton_serves


# From here unpacking costs less (about 20 %, by arithmetic) than an opaque operator does.
LEAST_TOKENS = 1024
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # largest values of the 8-bit dtypes
COLUMN_MULTIPLE = 16  # library products want rows of whole 16-byte words

_LIBRARY = torch.library.Library("diffusers_ternary", "FRAGMENT")
_LIBRARY.define(f"unpack_8bit{UNPACK_8BIT}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "quantize(Tensor x, str dtype, SymInt hadamard) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)


def _padded(in_features: int) -> int:
    return -(-in_features // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def unpack_reference(weight: PackedWeight, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as operand of an 8-bit product.

    Args:
        weight ([`PackedWeight`]): W.
        dtype (`str`): `"int8"` or `"float8_e4m3fn"`.

    Returns:
        `[N, K']` of that dtype, K' = K rounded up to 16, zero past K, and float32 scales of rows `[N]`. Group scales
        are integers of 1..63 times a row scale, as in the kernels: exact for the `"double"` layout in int8.
    """
    values, row_scale = reference.integer_weight(weight)
    values = F.pad(values, (0, _padded(weight.in_features) - weight.in_features))
    return values if dtype == "int8" else values.float().to(torch.float8_e4m3fn), row_scale


def _unpack_triton(weight: PackedWeight, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not triton_serves(weight.packed.device):
        return unpack_reference(weight, dtype)
    from .. import triton as kernels

    return kernels.unpack_8bit(weight, dtype)


_LIBRARY.impl("unpack_8bit", weight_kernel(unpack_reference), "CompositeExplicitAutograd")
for _device_type in TRITON_DEVICE_TYPES:
    _LIBRARY.impl("unpack_8bit", weight_kernel(_unpack_triton), _device_type.upper())


@torch.library.register_fake("diffusers_ternary::unpack_8bit", lib=_LIBRARY)
@weight_kernel
def _(weight: PackedWeight, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    n = weight.out_features
    values = weight.packed.new_empty(n, _padded(weight.in_features), dtype=getattr(torch, dtype))
    return values, weight.packed.new_empty(n, dtype=torch.float32)


def quantize(x: torch.Tensor, dtype: str, hadamard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations to 8 bits with one scale per token, in plain torch.

    Args:
        x (`torch.Tensor`): `[..., K]` float.
        dtype (`str`): `"int8"` (scale max|x| / 127, half to even) or `"float8_e4m3fn"` (max|x| / 448).
        hadamard (`int`): block size of a rotation before; 0 = none.

    Returns:
        `[..., K']` of that dtype, K' = K rounded up to 16, zero past K, and float32 scales `[..., 1]`: 0 for a token
        of zeros, NaN for one with NaN or an infinity.
    """
    columns, limit = x.shape[-1], LIMITS[dtype]
    values = rotate(x, hadamard).float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    finite = largest < float("inf")
    # Below 1e-30 the inverse would overflow; such a token is a token of zeros.
    values = values * torch.where(finite & (largest > 1e-30), limit / largest, 0.0)
    values = values.round().to(torch.int8) if dtype == "int8" else values.to(torch.float8_e4m3fn)
    if columns % COLUMN_MULTIPLE:
        values = F.pad(values.view(torch.int8), (0, -columns % COLUMN_MULTIPLE)).view(values.dtype)
    return values, torch.where(finite, largest / limit, float("nan"))


def _quantize_once(x: torch.Tensor, dtype: str, hadamard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[`quantize`], but once for all layers that a traced graph gives the same tensor to.

    Compilers do not look for equal subgraphs in inference. While they trace, the same value is the same object, and
    its version counts changes in place.
    """
    if type(x) is torch.Tensor:
        return quantize(x, dtype, hadamard)
    key = (x._version, dtype, hadamard)
    known = x.__dict__.get("_diffusers_ternary_quantized")
    if known is None or known[0] != key:
        known = (key, quantize(x, dtype, hadamard))
        x.__dict__["_diffusers_ternary_quantized"] = known
    return known[1]


# Composite: tracers that lower to aten step into it.
_LIBRARY.impl("quantize", _quantize_once, "CompositeImplicitAutograd")


def traced_linear(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """[`ternary_linear`] for a graph without gradients, or `None` where the opaque operator serves better."""
    device, dtype = input.device, input.dtype
    if device.type not in TRITON_DEVICE_TYPES or input.shape[-1] != weight.in_features:
        return None
    sizes = (weight.out_features, weight.in_features, weight.group_size)
    layout = (*sizes, weight.scale.dtype, weight.multiplier is not None, None, activation_dtype)
    eight = library_dtype(device.type, device.index or 0, dtype, *layout)
    if eight is None or input.numel() < LEAST_TOKENS * weight.in_features:
        return None
    codes, token_scale = torch.ops.diffusers_ternary.quantize(input, eight, weight.hadamard)
    dense, row_scale = call_unpack(torch.ops.diffusers_ternary.unpack_8bit, weight, eight)
    codes, token_scale = codes.flatten(0, -2), token_scale.flatten(0, -2)
    if eight == "int8":
        product = torch._int_mm(codes, dense.t()).float() * (token_scale * row_scale)
        y = (product if bias is None else product + bias).to(dtype)
    else:
        y = torch._scaled_mm(
            codes,
            dense.t(),
            scale_a=token_scale,
            scale_b=row_scale.unsqueeze(0),
            bias=None if bias is None else bias.to(dtype),
            out_dtype=dtype,
            use_fast_accum=True,
        )
    return y.view(*input.shape[:-1], weight.out_features)


@constant_when_traced
def library_dtype(*request: Any) -> str | None:
    """The 8-bit dtype in which the vendor's product serves many rows, asked while a graph is traced."""
    return _library_dtype(*request)


@functools.lru_cache(maxsize=4096)
def _library_dtype(device_type: str, index: int, dtype: torch.dtype, *layout: Any) -> str | None:
    device = torch.device(device_type, index)
    if not torch.get_device_module(device_type).is_available() or not triton_serves(device):
        return None
    from .. import triton as kernels

    return kernels.library_dtype(device, dtype, Layout(*layout))
