# SPDX-License-Identifier: Apache-2.0
"""Symmetric int8 with one scale per row, for layers that ternary would hurt."""

import dataclasses

import torch

from ..format import Int8Spec, storage_dtype
from .weight import check_finite, check_matrix


INT8_MAX = 127


@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """An int8 weight: `values` int8 `[N, K]`, `scale` 16-bit `[N, 1]`; the dense weight is their product."""

    spec: Int8Spec
    values: torch.Tensor
    scale: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of [`Int8Spec.memory_tensors`]."""
        return {"weight": self.values, "weight_scale": self.scale}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense weight `[N, K]`: the product is formed in float32 and rounded once to `dtype`."""
        return (self.values.float() * self.scale.float()).to(dtype)


def quantize_int8(weight: torch.Tensor, *, name: str = "weight") -> Int8Weight:
    """Rounds a float weight to int8 per row, symmetric, scale = max|w| / 127.

    The scale is rounded to 16 bits first and the values against the rounded scale, so no value leaves -127..127 by
    more than the clamp of half a step.

    Args:
        weight (`torch.Tensor`): float `[N, K]`.
        name (`str`, *optional*): layer name for messages.

    Returns:
        [`Int8Weight`] on the device of `weight`. A row of zeros has scale 0.

    Raises:
        ValueError: if the weight is not a float matrix, or holds NaN or Inf.
    """
    check_matrix(weight, name=name)
    check_finite(weight, name=name)
    exact = weight.abs().amax(dim=1, keepdim=True).float() / INT8_MAX
    scale = exact.to(storage_dtype(exact))
    step = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    values = (weight.float() / step).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Int8Weight(Int8Spec(*weight.shape), values, scale)
