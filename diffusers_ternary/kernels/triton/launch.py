# SPDX-License-Identifier: Apache-2.0
"""Grids, arguments and buffers: from tensors to kernel launches, on the current stream, without synchronization.

Buffers come from the caching allocator for each call and are freed on return: one layer's scratch at a time, safe
with streams and CUDA graphs.
"""

import dataclasses
import math

import torch

from .activations import quantize_kernel
from .dense import dense_kernel
from .dispatch import SUMS, Plan
from .epilogue import epilogue_kernel
from .fused import fused_kernel
from .gemv import gemv_kernel
from .hadamard import rotate_kernel
from .int8_gemv import int8_gemv_kernel
from .recording import buffer, launch
from .unpack import derive_multipliers_kernel, unpack_kernel
from .weights import PackedWeight


KINDS = {"none": "float", "int8": "int8", "float8_e4m3fn": "fp8"}
# Library products want rows of whole 16-byte words.
ROW_ALIGNMENT = 16
# Bytes that a thread unpacks.
LONGEST_RUN = 16
# One token of this many elements stays in the registers of one program.
MAX_TOKEN_BLOCK = 16384
# A rotation alone needs no whole tokens: small blocks, many programs.
ROTATION_BLOCK = 2048


# Triton's own functions for these two take microseconds on the host, in each call of each layer.
def ceil_div(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def power_of_two_from(size: int) -> int:
    """The smallest power of two of at least `size`."""
    return 1 << (size - 1).bit_length()


def alignment_of(plan: Plan) -> int:
    """What the columns of 8-bit operands are a multiple of, zeros at the end: whole blocks, or 16-byte words."""
    return plan.block_k if plan.path == "dense" else ROW_ALIGNMENT


def factor_of(kind: str, per_row: bool, *, scale_sums: bool = False) -> float:
    """What undoes the constants of decoded codes (64 or 2) and of integer multipliers (63)."""
    if kind == "float":
        return 0.5
    if per_row:
        return 1 / 64 if kind == "int8" else 0.5
    return 1 / 126 if kind == "fp8" and scale_sums else 1 / 63


def rotate(x: torch.Tensor, hadamard: int) -> torch.Tensor:
    """`x @ R` with R = H_b / sqrt(b) on each whole block of b columns; the last K mod b columns are left as they are.

    Args:
        x (`torch.Tensor`): `[M, K]` float, contiguous.
        hadamard (`int`): b, a power of two of at most `MAX_TOKEN_BLOCK`.
    """
    rows, columns = x.shape
    out = buffer(*x.shape, dtype=x.dtype, device=x.device)
    block = max(hadamard, min(power_of_two_from(columns), ROTATION_BLOCK))
    launch(
        rotate_kernel,
        (rows, ceil_div(columns, block)),
        x,
        out,
        columns,
        STAGES=hadamard.bit_length() - 1,
        BLOCK_K=block,
        num_warps=token_warps(block),
    )
    return out


def token_warps(block: int) -> int:
    """Warps for a block of one token: sixteen elements a thread."""
    return min(max(block // 512, 1), 16)


def quantize_activations(
    x: torch.Tensor, activation_dtype: str, hadamard: int = 0, *, alignment: int = ROW_ALIGNMENT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to 8 bits.

    Args:
        x (`torch.Tensor`): `[M, K]` float, contiguous.
        activation_dtype (`str`): `"int8"` or `"float8_e4m3fn"`.
        hadamard (`int`): rotates the tokens first, as [`rotate`] does; 0 = no rotation.
        alignment (`int`): see [`alignment_of`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int8 `[M, K']` (float8 as its bits), K' = K rounded up to `alignment`,
        zero past K; and the scales, float32 `[M]`.
    """
    rows, columns = x.shape
    stride = ceil_div(columns, alignment) * alignment
    out = buffer(rows, stride, dtype=torch.int8, device=x.device)
    scale = buffer(rows, dtype=torch.float32, device=x.device)
    block = max(hadamard, min(power_of_two_from(stride), MAX_TOKEN_BLOCK))
    launch(
        quantize_kernel,
        (rows,),
        x,
        out,
        scale,
        columns,
        stride,
        FP8=activation_dtype == "float8_e4m3fn",
        STAGES=hadamard.bit_length() - 1 if hadamard else 0,
        ONE_BLOCK=block >= stride,
        BLOCK_K=block,
        num_warps=token_warps(block),
    )
    return out, scale


def derive_multipliers(weight: PackedWeight) -> PackedWeight:
    """Group scales as integer multipliers of a row scale (see `derive_multipliers_kernel`)."""
    groups = weight.groups
    device = weight.packed.device
    multiplier = buffer(weight.out_features, groups, dtype=torch.int8, device=device)
    row_scale = buffer(weight.out_features, 1, dtype=torch.float32, device=device)
    launch(
        derive_multipliers_kernel,
        (weight.out_features,),
        weight.scale,
        multiplier,
        row_scale,
        groups,
        BLOCK_G=power_of_two_from(groups),
        num_warps=1,
    )
    return dataclasses.replace(weight, scale=row_scale, multiplier=multiplier)


def unpack_float(weight: PackedWeight, dtype: torch.dtype, *, inline_ptx: bool) -> torch.Tensor:
    """The dequantized weight `[N, K]` in a float dtype."""
    out = buffer(weight.out_features, weight.in_features, dtype=dtype, device=weight.packed.device)
    _unpack(weight, out, None, "exact", inline_ptx)
    return out


def unpack_8bit(
    weight: PackedWeight, kind: str, *, inline_ptx: bool, alignment: int = ROW_ALIGNMENT
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as operand of an 8-bit product: int8 `[N, K']` (float8 as its bits) and float32 row scales `[N]`."""
    columns = ceil_div(weight.in_features, alignment) * alignment
    out = buffer(weight.out_features, columns, dtype=torch.int8, device=weight.packed.device)
    row_scale = buffer(weight.out_features, dtype=torch.float32, device=weight.packed.device)
    _unpack(weight, out, row_scale, kind, inline_ptx)
    return out, row_scale


def _unpack(
    weight: PackedWeight, out: torch.Tensor, row_scale: torch.Tensor | None, kind: str, inline_ptx: bool
) -> None:
    block_n, block_k = 16, 128
    group_size = 0 if weight.per_row else weight.group_size
    width = weight.plane_width
    last_plane = max(width, out.shape[1] - 3 * width)  # with its zeros
    grid = (ceil_div(weight.out_features, block_n), ceil_div(last_plane, block_k))
    launch(
        unpack_kernel,
        grid,
        weight.packed,
        weight.scale,
        weight.multiplier,
        out,
        row_scale,
        weight.out_features,
        weight.in_features,
        width,
        weight.groups,
        out.shape[1],
        factor_of(kind, weight.per_row),
        KIND=kind,
        GROUP_SIZE=group_size,
        ASM=inline_ptx,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        RUN=math.gcd(LONGEST_RUN, width, group_size),
        num_warps=4,
    )


def packed_product(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    kind: str,
    plan: Plan,
    inline_ptx: bool,
) -> None:
    """Runs the `"gemv"` or `"fused"` kernel into `y`.

    Args:
        x (`torch.Tensor`): `[M, K]` float, or int8 `[M, K']` of quantized activations with `x_scale` `[M]`.
        kind (`str`): `"float"`, `"int8"` or `"fp8"`.
    """
    rows = x.shape[0]
    width = weight.plane_width
    groups = plan.scale_mode(weight)
    # With float activations the scales of groups are multiplied into the operand, and nothing is left for the end.
    row_scale = weight.scale if kind != "float" or weight.per_row else None
    arguments = (
        x,
        weight.packed,
        weight.scale,
        weight.multiplier,
        row_scale,
        x_scale,
        bias,
        y,
        rows,
        weight.out_features,
        weight.in_features,
        width,
        weight.groups,
        x.shape[1],
        factor_of(kind, weight.per_row, scale_sums=groups == SUMS),
    )
    options = {
        "KIND": kind,
        "GROUPS": groups,
        "GROUP_SIZE": weight.group_size if groups else 0,  # a row's only one is not a reason to compile again
        "EVEN_K": weight.in_features == 4 * width and width % plan.block_k == 0,
        "ASM": inline_ptx,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    tiles_n = ceil_div(weight.out_features, plan.block_n)
    if plan.path == "gemv":
        launch(gemv_kernel, (tiles_n,), *arguments, **options)
    else:
        tiles = ceil_div(rows, plan.block_m) * tiles_n
        launch(fused_kernel, (tiles,), *arguments, **options, WEIGHT_LEFT=plan.weight_left, GROUP_M=8)


def dense_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    dense: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    kind: str,
    plan: Plan,
    no_prefetch: bool,
) -> None:
    """Runs the dense 8-bit kernel into `y`: x int8 `[M, K']`, dense int8 `[N, K']`, K' whole blocks of the plan."""
    rows, columns = x.shape
    grid = (ceil_div(rows, plan.block_m) * ceil_div(dense.shape[0], plan.block_n),)
    launch(
        dense_kernel,
        grid,
        x,
        dense,
        row_scale,
        x_scale,
        bias,
        y,
        rows,
        dense.shape[0],
        columns,
        1.0,
        KIND=kind,
        NO_PREFETCH=no_prefetch,
        EXACT=plan.exact,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        GROUP_M=8,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def int8_gemv(
    x: torch.Tensor, values: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`(x @ values.T) * row_scale + bias` for at most 16 rows: x float `[M, K]`, values int8 `[N, K]`."""
    rows, columns = x.shape
    y = buffer(rows, values.shape[0], dtype=x.dtype, device=x.device)
    block_n, block_k = (16, 64) if x.dtype == torch.float32 else (32, 128)
    launch(
        int8_gemv_kernel,
        (ceil_div(values.shape[0], block_n),),
        x,
        values,
        row_scale,
        bias,
        y,
        rows,
        values.shape[0],
        columns,
        EVEN_K=columns % block_k == 0,
        BLOCK_M=16,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4 if x.dtype == torch.float32 else 2,
        num_stages=2 if x.dtype == torch.float32 else 4,
    )
    return y


def epilogue(
    acc: torch.Tensor, x_scale: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Scales an int32 product `[M, N]` into `y`."""
    rows, columns = acc.shape
    block_m, block_n = 16, 256
    grid = (ceil_div(rows, block_m), ceil_div(columns, block_n))
    launch(
        epilogue_kernel,
        grid,
        acc,
        row_scale,
        x_scale,
        bias,
        y,
        rows,
        columns,
        1.0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
