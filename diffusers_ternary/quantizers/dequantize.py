# SPDX-License-Identifier: Apache-2.0
"""Packed layers back to `nn.Linear`."""

import torch
from torch import nn

from .summary import packed_layers


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces every packed layer of `model` by a float `nn.Linear`, one at a time.

    Args:
        model (`nn.Module`): changed in place.
        dtype (`torch.dtype`, *optional*): of the new weights; default: the dtype of the layer's bias, else the
            model's first floating parameter, else float32.
    """
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    fallback = next(floating, torch.float32)
    for name, layer in packed_layers(model).items():
        own = fallback if layer.bias is None else layer.bias.dtype
        linear = layer.to_float(dtype or layer.compute_dtype or own)
        linear.train(layer.training)
        model.set_submodule(name, linear)
