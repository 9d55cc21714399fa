# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A dense 8-bit matrix product with the ternary epilogue, for weights that were unpacked first."""

import triton
import triton.language as tl

from .epilogue import store_output
from .tiles import tile_of_program


@triton.jit
def not_prefetched(block):
    """An int8 block as it is, through an instruction that the compiler does not look behind.

    It would carry the operands of the next step in registers, byte by byte: 349 instructions a step instead of 98, or
    spills. The second operand, unused, is what stops it.
    """
    zero = tl.full((), 0, tl.int32)
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r,r", [block, zero], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit(do_not_specialize=["M"])  # no compilation for a new number of rows
def dense_kernel(
    x_ptr,
    weight_ptr,
    row_scale_ptr,
    x_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    factor,
    KIND: tl.constexpr,
    NO_PREFETCH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`y = x @ W.T`, scaled; x `[M, K]` and weight `[N, K]` int8, or float8 as int8; y `[M, N]`.

    K is a multiple of BLOCK_K, zeros at its end: loads that need no mask are pipelined.
    EXACT: the matrix unit of sm_90 keeps 14 bits of float8 sums; each block's go to float32 registers of their own.
    NO_PREFETCH: for targets whose matrix instruction reads both operands from registers (sm_80 to sm_89).
    """
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    x_k = tl.arange(0, BLOCK_K)[None, :]
    w_k = tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if KIND == "int8" else tl.float32)
    if KIND == "fp8":
        # Loaded as float8, tiles go to the matrix unit untouched.
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        weight_ptr = weight_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    # Rows past the end wrap around: valid memory, and the epilogue does not store them.
    x_rows = x_ptr + (m % M).to(tl.int64) * K
    w_rows = weight_ptr + (n % N).to(tl.int64) * K
    for k in tl.range(0, K, BLOCK_K):
        x = tl.load(x_rows + (k + x_k))
        weight = tl.load(w_rows + (k + w_k))
        if NO_PREFETCH:
            weight = not_prefetched(weight.to(tl.int8, bitcast=True))
        if KIND == "fp8":
            x = x.to(tl.float8e4nv, bitcast=True)
            weight = weight.to(tl.float8e4nv, bitcast=True)
        if EXACT:
            acc = tl.dot(x, weight, acc, out_dtype=acc.dtype, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(x, weight, acc, out_dtype=acc.dtype)
    store_output(acc, m, n, M, N, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, factor)
