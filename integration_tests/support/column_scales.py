# SPDX-License-Identifier: Apache-2.0
"""Packed layers with random column scales, which only calibration makes otherwise."""

import dataclasses

import torch
from torch import nn

from diffusers_ternary.layers import TernaryLayer
from diffusers_ternary.ternarize import TernaryWeight


def with_column_scale(weight: TernaryWeight, seed: int = 0) -> TernaryWeight:
    """The same codes with factors of the inputs between 1/2 and 2."""
    factors = 2 ** (2 * torch.rand(weight.spec.in_features, generator=torch.Generator().manual_seed(seed)) - 1)
    return dataclasses.replace(
        weight, spec=dataclasses.replace(weight.spec, column_scales=True), column_scale=factors.half()
    )


def scale_columns(model: nn.Module) -> None:
    """Gives every ternary layer column scales."""
    for seed, layer in enumerate(module for module in model.modules() if isinstance(module, TernaryLayer)):
        weight = TernaryWeight(
            layer.spec, layer.weight.detach(), layer.scales, layer.weight_multiplier, layer.low_rank
        )
        layer.install_weight(with_column_scale(weight, seed))
