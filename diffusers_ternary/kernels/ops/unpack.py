# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::unpack`: packed codes times scales as a dense matrix, one implementation per device."""

import torch

from .. import reference
from ..operands import PackedWeight
from .schema import call_unpack, weight_kernel


_reference = weight_kernel(reference.dequantize)


@torch.library.custom_op("diffusers_ternary::unpack", mutates_args=())
def ternary_unpack(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense codes times scales, `[N, K]`, formed in float32 and rounded once to `dtype`; a rotation stays.

    Args:
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        dtype (`torch.dtype`): of the result.
    """
    return _reference(weight, scale, multiplier, in_features, group_size, dtype)


@ternary_unpack.register_fake
@weight_kernel
def _(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return weight.packed.new_empty(weight.out_features, weight.in_features, dtype=dtype)


def unpack_weight(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[`ternary_unpack`] of a [`PackedWeight`]."""
    return call_unpack(ternary_unpack, weight, dtype)
