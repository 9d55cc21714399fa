# SPDX-License-Identifier: Apache-2.0
"""Packed layers back to float ones."""

import torch
from torch import nn

from .summary import packed_layers


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces every packed layer of `model` by the float module it stands for, one at a time.

    Args:
        model (`nn.Module`): changed in place.
        dtype (`torch.dtype`, *optional*): of the new weights; default: the dtype of the layer's bias, else the
            model's first floating parameter, else float32.
    """
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    fallback = next(floating, torch.float32)
    for name, layer in packed_layers(model).items():
        own = fallback if layer.bias is None else layer.bias.dtype
        module = layer.to_float(dtype or layer.compute_dtype or own)
        model.set_submodule(name, module)
