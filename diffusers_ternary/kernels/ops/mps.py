# SPDX-License-Identifier: Apache-2.0
"""The operators on Apple GPUs."""

import torch

from .checks import check_devices
from .ternary_linear import check_arguments, ternary_linear
from .unpack import ternary_dequantize


@ternary_linear.register_kernel("mps")
def _linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    from .. import mps

    return mps.linear(
        input,
        weight,
        scale,
        multiplier,
        bias,
        in_features=in_features,
        group_size=group_size,
        activation_dtype=activation_dtype,
        hadamard=hadamard,
    )


@ternary_dequantize.register_kernel("mps")
def _dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_devices(weight.device, "the weight", scale=scale, multiplier=multiplier)
    from .. import mps

    return mps.dequantize(weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype)
