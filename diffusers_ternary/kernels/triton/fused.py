# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Decode and multiply in one kernel: packed weights go from memory to registers to the tensor cores."""

import triton
import triton.language as tl

from .decode import decode, load_groups
from .epilogue import store_output
from .multiply_add import multiply_add
from .tiles import tile_of_program


@triton.jit(do_not_specialize=["M"])  # no compilation for a new number of rows
def fused_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    row_scale_ptr,
    x_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    KP,
    G,
    x_stride,
    factor,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`y = x @ W.T`, scaled; x `[M, x_stride]` (float, int8, or float8 as int8), weight int8 `[N, KP]`, y `[M, N]`.

    The planes are the outer loop: the body holds one dot product and a constant shift, and the packed bytes are read
    once per plane, so that a weight costs one byte of traffic, as a dense int8 weight would.
    WEIGHT_LEFT computes the transposed tile, with the decoded weight as the left operand, which on some targets stays
    in registers. EVEN_K: K == 4 * KP and KP is a multiple of BLOCK_K, so columns need no mask.
    """
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if WEIGHT_LEFT:
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
        n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        x_k = tl.arange(0, BLOCK_K)[:, None]
        w_k = tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if KIND == "int8" else tl.float32)
    else:
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        x_k = tl.arange(0, BLOCK_K)[None, :]
        w_k = tl.arange(0, BLOCK_K)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if KIND == "int8" else tl.float32)
    if KIND == "fp8" and EVEN_K:
        # Loaded as float8, tiles go to the matrix unit untouched; the masked load of the interpreter refuses them.
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    # Rows past the end wrap around: valid memory, and the epilogue does not store them.
    x_rows = x_ptr + (m % M).to(tl.int64) * x_stride
    w_rows = weight_ptr + (n % N).to(tl.int64) * KP
    for j in tl.static_range(4):
        first = j * KP
        for c in tl.range(0, KP, BLOCK_K):
            if EVEN_K:
                packed = tl.load(w_rows + (c + w_k))
                x = tl.load(x_rows + (first + c + x_k))
            else:
                packed = tl.load(w_rows + (c + w_k), mask=c + w_k < KP, other=0)
                inside = (c + x_k < KP) & (first + c + x_k < K)
                x = tl.load(x_rows + (first + c + x_k), mask=inside, other=0)
            group = 0
            if GROUPS == 1 or GROUPS == 3:
                group = load_groups(scale_ptr, multiplier_ptr, n, first + c, N, K, G, GROUP_SIZE, KIND)
            elif GROUPS == 2:
                group = load_groups(scale_ptr, multiplier_ptr, n, first + c + w_k, N, K, G, GROUP_SIZE, KIND)
            if KIND == "fp8":
                x = x.to(tl.float8e4nv, bitcast=True)
            weight = decode(packed, group, KIND, GROUPS, x.dtype, 2 * j, ASM)
            acc = multiply_add(acc, weight, x, group, KIND, GROUPS, WEIGHT_LEFT)
    store_output(acc, m, n, M, N, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, factor)
