# SPDX-License-Identifier: Apache-2.0
"""The operators on Apple GPUs."""

import torch

from ..operands import PackedWeight
from .linear_map import register_linear
from .schema import weight_kernel
from .unpack import ternary_unpack


def _serve(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor:
    from .. import mps

    return mps.linear(input, weight, bias, activation_dtype)


register_linear(_serve, ["mps"], prepared=False)


@ternary_unpack.register_kernel("mps")
@weight_kernel
def _unpack(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    from .. import mps

    return mps.dequantize(weight, dtype)
