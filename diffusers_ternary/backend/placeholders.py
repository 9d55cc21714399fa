# SPDX-License-Identifier: Apache-2.0
"""Replaces float layers by packed ones that a loader will fill."""

from typing import Any

import torch
from torch import nn

from ..format import Int8Spec, LayerSpec
from ..layers import (
    FLOAT_TYPES,
    FloatLayer,
    Int8Conv2d,
    Int8Linear,
    QuantizedLayer,
    TernaryConv2d,
    TernaryLinear,
    matrix_shape,
)
from .config import TernaryConfig
from .plan import ConversionPlan, layer_spec


def placeholder_for(module: FloatLayer, spec: LayerSpec, config: TernaryConfig) -> QuantizedLayer:
    """A packed layer in the place of `module`, not yet filled; it takes over the bias parameter."""
    options: dict[str, Any] = {
        "bias": False,
        "activation_dtype": config.activation_dtype,
        "compute_dtype": config.torch_compute_dtype,
        "device": "meta",
        "dtype": module.weight.dtype,
    }
    layer: QuantizedLayer
    if isinstance(module, nn.Conv2d):
        layer = (Int8Conv2d if isinstance(spec, Int8Spec) else TernaryConv2d)(spec, module, **options)
    else:
        layer = (Int8Linear if isinstance(spec, Int8Spec) else TernaryLinear)(spec, **options)
    layer.bias = module.bias
    layer.train(module.training)
    return layer


def insert_placeholders(model: nn.Module, plan: ConversionPlan, config: TernaryConfig) -> None:
    """Swaps the layers of the plan for placeholders, whose float weight a loader will hand over."""
    for name, kind in plan.kinds.items():
        module = model.get_submodule(name)
        assert isinstance(module, FLOAT_TYPES)
        model.set_submodule(name, placeholder_for(module, layer_spec(kind, module, config), config))


def insert_packed(
    model: nn.Module,
    layers: dict[str, LayerSpec],
    scale_dtypes: dict[str, torch.dtype],
    config: TernaryConfig,
    *,
    source: str,
) -> None:
    """Swaps layers for packed ones without values, as a checkpoint describes them.

    Raises:
        ValueError: if the model has no such layer, or one of another shape.
    """
    for name, spec in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if type(module) not in FLOAT_TYPES:
            raise ValueError(
                f"{source} holds the packed layer {name}, which is not a linear layer or convolution of "
                f"{type(model).__name__}. The weights belong to another architecture; check config.json."
            )
        assert isinstance(module, FLOAT_TYPES)
        if matrix_shape(module) != (spec.out_features, spec.in_features):
            raise ValueError(
                f"{source}: {name} is packed as {[spec.out_features, spec.in_features]}, but {type(model).__name__} "
                f"expects {list(matrix_shape(module))}. config.json does not fit the weights."
            )
        layer = placeholder_for(module, spec, config)
        layer.install_empty(scale_dtypes[name])
        model.set_submodule(name, layer)
