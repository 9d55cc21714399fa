# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Block-Hadamard rotation of activations: the fast Walsh-Hadamard transform, in registers, exact in float32.

log2(b) stages of additions, whatever the dtype of x. A dot product with the matrix of signs takes as many instructions
for b = 128 (its entries must be made in each program), and more shared memory.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_columns(x, k, K, STAGES: tl.constexpr, BLOCK_K: tl.constexpr):
    """`x @ R` for columns of one row: R = H_b / sqrt(b) on each whole block of b = 2**STAGES columns.

    Args:
        x: float32 `[BLOCK_K]`; BLOCK_K is a multiple of b, and so is the first column.
        k: the columns.
        K: columns of the row; its K mod b last ones are left as they are.
    """
    y = x
    for i in tl.static_range(STAGES):
        # Columns that differ in bit i: their sum and their difference.
        pairs = tl.permute(tl.reshape(y, (BLOCK_K // (2 << i), 2, 1 << i)), (0, 2, 1))
        low, high = tl.split(pairs)
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (BLOCK_K,))
    whole = K - K % (1 << STAGES)
    return tl.where(k < whole, y * (2.0 ** (-0.5 * STAGES)), x)


@triton.jit
def rotate_kernel(x_ptr, out_ptr, K, STAGES: tl.constexpr, BLOCK_K: tl.constexpr):
    """`out = x @ R` for x `[M, K]`, rounded once to the dtype of out; a program takes BLOCK_K columns of one row."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
    y = rotate_columns(x, k, K, STAGES, BLOCK_K)
    tl.store(out_ptr + row + k, y.to(out_ptr.dtype.element_ty), mask=k < K)
