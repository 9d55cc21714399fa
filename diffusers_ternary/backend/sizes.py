# SPDX-License-Identifier: Apache-2.0
"""How many bytes a layer or a model takes: in a file, and in memory once it is packed."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..format import LayerSpec, TensorSpec
from ..layers import QuantizedLayer
from .config import RECOVER, TernaryConfig


def file_bytes(spec: LayerSpec) -> int:
    """Bytes of a layer's tensors in a file, with 16-bit scales; the bias is not counted."""
    return _bytes(spec.file_tensors())


def memory_bytes(spec: LayerSpec) -> int:
    """Bytes of a layer's tensors in memory, with 16-bit scales; the bias is not counted."""
    return _bytes(spec.memory_tensors())


def _bytes(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(
        math.prod(tensor.shape) * (2 if name == "weight_scale" else tensor.dtypes[0].itemsize)
        for name, tensor in tensors.items()
    )


def bits_per_weight(specs: Mapping[str, LayerSpec]) -> float:
    """Stored bits per converted weight in a file: codes, scales and multipliers; biases are not weights."""
    return 8 * sum(file_bytes(spec) for spec in specs.values()) / sum(spec.weights for spec in specs.values())


def planned_bytes(layer: QuantizedLayer, config: TernaryConfig) -> int:
    """Bytes of a layer's packed tensors in memory; of a placeholder, of those of its spec.

    The bias is not counted. Layers that `rounding="recover"` may keep count as float; weights that are ternary already
    may take more or less than their spec.
    """
    if layer.is_packed:
        return layer.stored_bytes()
    if config.rounding == RECOVER:
        return layer.weight.nbytes
    return memory_bytes(layer.spec)


def bytes_per_weight(layer: QuantizedLayer, config: TernaryConfig) -> float:
    """[`planned_bytes`] for each value of the placeholder's float weight."""
    return planned_bytes(layer, config) / layer.weight.numel()


def model_bytes(model: nn.Module, config: TernaryConfig) -> int:
    """Bytes of a model's parameters and buffers once its placeholders are packed."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
    placeholders = {f"{name}.weight": layer for name, layer in layers if not layer.is_packed}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return sum(
        planned_bytes(placeholders[name], config) if name in placeholders else tensor.nbytes
        for name, tensor in tensors.items()
    )


def warm_up_factor(model: nn.Module, config: TernaryConfig, dtype: torch.dtype) -> int:
    """What diffusers divides the elements of a model by before it allocates as many values of `dtype` on a GPU.

    The quotient is at most what the model takes once it is packed.
    """
    elements = sum(tensor.numel() for tensor in model.state_dict().values())
    return max(1, math.ceil(elements * dtype.itemsize / max(1, model_bytes(model, config))))
