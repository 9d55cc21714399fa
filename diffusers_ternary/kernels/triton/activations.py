# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Activations to 8 bits, one scale per token: rotation, absolute maximum, scaling, rounding and cast in one kernel."""

import triton
import triton.language as tl

from .hadamard import rotate_columns


@triton.jit
def _round(scaled, FP8: tl.constexpr):
    if FP8:
        return scaled.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    # 1.5 * 2**23 pushes the fraction out of a float32: round half to even on every target, without a library call.
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _finite_or_inf(x):
    # A maximum may drop NaN; infinity survives it.
    magnitude = tl.abs(x)
    return tl.where(magnitude == magnitude, magnitude, float("inf"))


@triton.jit
def _load(x_row, k, K, STAGES: tl.constexpr, BLOCK_K: tl.constexpr):
    x = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
    if STAGES > 0:
        x = rotate_columns(x, k, K, STAGES, BLOCK_K)
    return x


@triton.jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    x_scale_ptr,
    K,
    out_stride,
    FP8: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token per program: out = round(x / scale), scale = max|x| / 127 (int8) or / 448 (float8_e4m3fn).

    out is int8 `[M, out_stride]` (float8 as its bits), zero past K; x_scale is float32 `[M]`. A token of zeros gives
    zeros and scale 0; a token with NaN or Inf gives scale NaN, and so a NaN output, as a float product would.
    STAGES > 0 rotates the token first, in blocks of 2**STAGES columns (see `rotate_columns`), without rounding it to
    16 bits in between. ONE_BLOCK keeps the token in registers; longer tokens are read twice.
    """
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m * K
    out_row = out_ptr + m * out_stride
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    if ONE_BLOCK:
        x = _load(x_row, k, K, STAGES, BLOCK_K)
        largest = _finite_or_inf(x)
    else:
        largest = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K):
            largest = tl.maximum(largest, _finite_or_inf(_load(x_row, start + k, K, STAGES, BLOCK_K)))
    amax = tl.max(largest)
    finite = amax < float("inf")
    # Below 1e-30 the inverse would overflow; such a token is a token of zeros.
    inverse = tl.where(finite & (amax > 1e-30), LIMIT / amax, 0.0)
    if ONE_BLOCK:
        tl.store(out_row + k, _round(x * inverse, FP8), mask=k < out_stride)
    else:
        for start in tl.range(0, out_stride, BLOCK_K):
            x = _load(x_row, start + k, K, STAGES, BLOCK_K)
            tl.store(out_row + start + k, _round(x * inverse, FP8), mask=start + k < out_stride)
    tl.store(x_scale_ptr + m, tl.where(finite, amax / LIMIT, float("nan")))
