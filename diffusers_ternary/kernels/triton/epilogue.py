# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""`y = acc * factor * scale[n] * x_scale[m] + bias[n]`, cast to the dtype of y: the end of every kernel."""

import triton
import triton.language as tl


@triton.jit
def store_output(acc, m, n, M, N, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, factor):
    """Scales, adds the bias, casts and stores.

    Args:
        acc: int32 or float32 block.
        m, n: indices that broadcast to the block, in either order.
        row_scale_ptr, x_scale_ptr, bias_ptr: `[N]`, `[M]`, `[N]`, or None.
        factor: float32, undoes the constants of the codes and multipliers.
    """
    scale = factor
    if row_scale_ptr is not None:
        scale = scale * tl.load(row_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if x_scale_ptr is not None:
        scale = scale * tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    y = acc.to(tl.float32) * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])  # no compilation for a new number of rows
def epilogue_kernel(
    acc_ptr, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, M, N, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The epilogue alone, for a product that a library left in int32 `[M, N]`."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    acc = tl.load(acc_ptr + m.to(tl.int64) * N + n, mask=(m < M) & (n < N), other=0)
    store_output(acc, m, n, M, N, row_scale_ptr, x_scale_ptr, bias_ptr, y_ptr, factor)
