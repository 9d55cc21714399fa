# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One step of a product: a decoded block times a block of activations, added to the accumulator."""

import triton
import triton.language as tl


@triton.jit
def multiply_add(acc, weight, x, group, KIND: tl.constexpr, GROUPS: tl.constexpr, WEIGHT_LEFT: tl.constexpr):
    """`acc + x @ weight`, or `acc + weight @ x` with WEIGHT_LEFT.

    With `GROUPS == 3` the block has one scale per row of the weight and its sum takes it: in float32, or for int8 as
    an integer, both exact. On sm_80 that is shorter than scaling the codes: 397 instructions a step instead of 514
    (int8, tile 128 x 128 x 128), 576 instead of 750 (one row of activations).
    """
    if GROUPS == 3:
        if WEIGHT_LEFT:
            part = tl.dot(weight, x, out_dtype=acc.dtype, input_precision="ieee")
        else:
            part = tl.dot(x, weight, out_dtype=acc.dtype, input_precision="ieee")
        if KIND == "int8":
            # The codes are multiples of 64: without that factor, int32 holds 63 times the sum.
            acc += (part >> 6) * group.to(tl.int32)
        else:
            acc += part * group.to(tl.float32)
    elif WEIGHT_LEFT:
        acc = tl.dot(weight, x, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, weight, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc
