# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::dequantize`: packed codes and scales to a dense matrix, one implementation per device."""

import torch

from .. import reference
from .checks import check_devices


@torch.library.custom_op("diffusers_ternary::dequantize", mutates_args=())
def ternary_dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense codes times scales, `[N, K]`, formed in float32 and rounded once to `dtype`.

    Args:
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        dtype (`torch.dtype`): of the result.
    """
    check_devices(weight.device, "the weight", scale=scale, multiplier=multiplier)
    return reference.dequantize(weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype)


@ternary_dequantize.register_fake
def _(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_devices(weight.device, "the weight", scale=scale, multiplier=multiplier)
    return weight.new_empty(weight.shape[0], in_features, dtype=dtype)
