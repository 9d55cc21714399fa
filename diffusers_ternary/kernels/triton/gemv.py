# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A few rows (M <= 16) against the packed weight: bound by memory, so each packed byte is read once."""

import triton
import triton.language as tl

from .decode import decode, load_groups
from .epilogue import store_output
from .multiply_add import multiply_add


@triton.jit(do_not_specialize_on_alignment=["M"])  # one row, or any other number of them
def gemv_kernel(
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
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`y = x @ W.T`, scaled; arguments as in `fused_kernel`.

    Tensor cores serve even one row: decoding for scalar multiply-adds would cost more time than reading the weight.
    The planes are the inner loop: four dot products per packed block.
    """
    m = tl.arange(0, BLOCK_M)[None, :]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x_k = tl.arange(0, BLOCK_K)[:, None]
    w_k = tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if KIND == "int8" else tl.float32)
    x_rows = x_ptr + (m % M) * x_stride
    w_rows = weight_ptr + (n % N).to(tl.int64) * KP
    for c in tl.range(0, KP, BLOCK_K):
        if EVEN_K:
            packed = tl.load(w_rows + (c + w_k))
        else:
            packed = tl.load(w_rows + (c + w_k), mask=c + w_k < KP, other=0)
        for j in tl.static_range(4):
            first = j * KP
            if EVEN_K:
                x = tl.load(x_rows + (first + c + x_k))
            else:
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
            acc = multiply_add(acc, weight, x, group, KIND, GROUPS, True)
    store_output(acc, m, n, M, N, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, factor)
