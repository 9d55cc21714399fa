# SPDX-License-Identifier: Apache-2.0
"""What the hosts' own methods do with packed models: casts, counts, control networks, averages of weights."""

import copy

from torch import nn

from ..layers.base import NOT_TRAINABLE
from .compat_models import patch_control_constructors, patch_ema, patch_model_class
from .dequantize import dequantize_layers
from .method import QUANT_METHOD
from .summary import count_parameters, has_packed_layers


def prepare_transformers() -> None:
    """Makes casts and `num_parameters` of transformers' models right for packed ones. Calling it again is harmless."""
    from transformers import PreTrainedModel  # not at import: it loads half of transformers

    patch_model_class(PreTrainedModel, has_packed_layers, count_parameters, NOT_TRAINABLE)


def prepare_diffusers() -> None:
    """The same for diffusers' models, and for what only diffusers has: control networks and `EMAModel`."""
    from diffusers import ModelMixin  # not at import: it loads half of diffusers

    patch_model_class(ModelMixin, has_packed_layers, count_parameters, NOT_TRAINABLE)
    patch_control_constructors(float_copy)
    patch_ema(QUANT_METHOD)


def float_copy(model: nn.Module) -> nn.Module:
    """The float model that a packed one stands for, in new tensors; a model without packed layers as it is."""
    if not has_packed_layers(model):
        return model
    copied = copy.deepcopy(model)
    if getattr(copied, "hf_quantizer", None) is not None:
        dequantized: nn.Module = copied.dequantize()  # type: ignore[operator]
        return dequantized
    dequantize_layers(copied)
    return copied
