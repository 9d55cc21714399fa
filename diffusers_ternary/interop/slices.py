# SPDX-License-Identifier: Apache-2.0
"""How large tensors are gone through."""

import math
from collections.abc import Sequence


_SLICE_WEIGHTS = 1 << 19


def row_slices(shape: Sequence[int]) -> list[slice]:
    """Slices of the first axis of a tensor that stay in the cache while something is done with them."""
    rows = shape[0] if shape else 1
    step = max(1, _SLICE_WEIGHTS * rows // max(1, math.prod(shape)))
    return [slice(start, start + step) for start in range(0, rows, step)]
