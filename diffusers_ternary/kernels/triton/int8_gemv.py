# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A few rows (M <= 16) against a dense int8 weight, with activations as they are: a byte is read for each weight."""

import triton
import triton.language as tl

from .epilogue import store_output


@triton.jit(do_not_specialize_on_alignment=["M"])  # one row, or any other number of them
def int8_gemv_kernel(
    x_ptr,
    weight_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`y = (x @ W.T) * row_scale + bias`; x float `[M, K]`, W int8 `[N, K]`, y `[M, N]`.

    Integers of 8 bits are exact in every float dtype; the sum and the scale are in float32.
    """
    m = tl.arange(0, BLOCK_M)[None, :]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x_k = tl.arange(0, BLOCK_K)[:, None]
    w_k = tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    x_rows = x_ptr + (m % M) * K
    w_rows = weight_ptr + (n % N).to(tl.int64) * K
    for k in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_rows + (k + x_k))
            weight = tl.load(w_rows + (k + w_k))
        else:
            x = tl.load(x_rows + (k + x_k), mask=k + x_k < K, other=0)
            weight = tl.load(w_rows + (k + w_k), mask=k + w_k < K, other=0)
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee", out_dtype=acc.dtype)
    store_output(acc, m, n, M, N, row_scale_ptr, None, bias_ptr, y_ptr, 1.0)
