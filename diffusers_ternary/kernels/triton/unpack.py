# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Packed weights to a dense matrix in memory: 8-bit operands of a dense product, or the dequantized float weight."""

import triton
import triton.language as tl

from .decode import decode, load_groups, plane_bits


@triton.jit
def unpack_kernel(
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    out_ptr,
    row_scale_ptr,
    N,
    K,
    KP,
    G,
    out_stride,
    factor,
    KIND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):
    """Each packed byte is read once and gives one element to each plane; columns from K to `out_stride` are zero.

    With KIND `"exact"` the output is `code * scale`, a float32 product rounded once; with `"int8"` and `"fp8"` it is
    what `decode` gives, and `scale[n] * factor` goes to `row_scale_ptr` (float32 `[N]`) unless that is None.

    GROUP_SIZE is 0 where a row has one scale. Otherwise RUN divides it and KP: RUN bytes have one scale in each plane,
    which is read once for them (10 loads a thread for runs of 16, 66 with a load for each element).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c0 = tl.program_id(1) * BLOCK_K
    n = rows[:, None, None]
    run = (c0 + tl.arange(0, BLOCK_K // RUN) * RUN)[None, :, None]
    c = run + tl.arange(0, RUN)[None, None, :]
    packed = tl.load(weight_ptr + n.to(tl.int64) * KP + c, mask=(n < N) & (c < KP), other=0)
    SCALED: tl.constexpr = 1 if GROUP_SIZE > 0 else 0
    group = 0
    if KIND == "exact" and GROUP_SIZE == 0:
        group = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    for j in tl.static_range(4):
        first = j * KP
        if GROUP_SIZE > 0:
            group = load_groups(scale_ptr, multiplier_ptr, n, first + run, N, K, G, GROUP_SIZE, KIND)
        if KIND == "exact":
            code = (plane_bits(packed, 2 * j, ASM) >> 6).to(tl.float32)
            dense = (code * group).to(out_ptr.dtype.element_ty)
        else:
            dense = decode(packed, group, KIND, SCALED, tl.int8, 2 * j, ASM).to(tl.int8, bitcast=True)
        inside = (n < N) & (first + c < out_stride)
        if j < 3:  # the last plane goes on with zeros to the end of the row
            inside &= c < KP
        tl.store(out_ptr + n.to(tl.int64) * out_stride + (first + c), dense, mask=inside)
    if row_scale_ptr is not None and c0 == 0:
        row_scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0).to(tl.float32) * factor
        tl.store(row_scale_ptr + rows, row_scale, mask=rows < N)


@triton.jit
def derive_multipliers_kernel(scale_ptr, multiplier_ptr, row_scale_ptr, G, BLOCK_G: tl.constexpr):
    """Group scales `[N, G]` of one row to integer multipliers of its largest one.

    multiplier[n, g] = the integer of 1..63 nearest to 63 * scale[n, g] / max_g scale, 0 only for a zero scale;
    row_scale[n] = the largest, float32. The error of a group's scale is at most max_g scale / 126, except that a
    scale below 1/126 of the largest becomes 1/63 of it.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    scale = tl.load(scale_ptr + n * G + g, mask=g < G, other=0.0).to(tl.float32)
    largest = tl.max(scale)
    ratio = tl.div_rn(scale, tl.where(largest > 0, largest, 1.0))
    nearest = tl.maximum((ratio * 63.0 + 0.5).to(tl.int32), 1)
    multiplier = tl.where(scale > 0, nearest, 0)
    tl.store(multiplier_ptr + n * G + g, multiplier.to(tl.int8), mask=g < G)
    tl.store(row_scale_ptr + n, largest)
