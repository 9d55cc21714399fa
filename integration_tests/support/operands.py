# SPDX-License-Identifier: Apache-2.0
"""Functions of a `PackedWeight`, called with its parts."""

from collections.abc import Callable
from typing import Any

import torch

from diffusers_ternary.kernels.operands import PackedWeight


def of_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(x, weight, bias, ...)`, called with the tensors of the weight and its sizes."""

    def call(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        group_size: int,
        hadamard: int = 0,
        **options: Any,
    ) -> Any:
        packed = PackedWeight(weight, scale, multiplier, in_features, group_size, hadamard)
        return function(x, packed, bias, **options)

    return call


def of_weight_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(weight, ...)`, called with the tensors of the weight and its sizes."""

    def call(
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        *,
        in_features: int,
        group_size: int,
        **options: Any,
    ) -> Any:
        return function(PackedWeight(weight, scale, multiplier, in_features, group_size), **options)

    return call
