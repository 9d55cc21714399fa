# SPDX-License-Identifier: Apache-2.0
"""Models inside of models: a head class holds its base class, a multimodal one its towers, a list its networks."""

import copy
import dataclasses
from typing import Any

from torch import nn

from .checkpoint import PackedCheckpoint
from .summary import has_packed_layers


def packed_parts(model: nn.Module, base_class: type) -> list[Any]:
    """The models of a host's `base_class` within `model`, itself included, that have packed layers."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, base_class)]
    return [part for part in parts if has_packed_layers(part)]


def give_own_config(model: Any) -> None:
    """Copies a model's config: models that were built from one object share it, and all of them would say "packed"."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for part in model.modules():
        config = getattr(part, "config", None)
        if id(config) in copies:  # of the parts too: their configs are within that of the model
            part.config = copies[id(config)]


def renamed_for(model: Any, checkpoint: PackedCheckpoint) -> PackedCheckpoint:
    """A checkpoint with the names that its layers have in `model`.

    A head class keeps its base model under a prefix. transformers loads the file of either one into the other: it adds
    or takes away the prefix, and leaves out the tensors of a head that the base class lacks.
    """
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}

    def fitting(layer: str) -> str | None:
        return next((name for name in (layer, layer.removeprefix(prefix), prefix + layer) if name in modules), None)

    names = {layer: fitting(layer) for layer in checkpoint.layout.layers}
    if all(name == layer for layer, name in names.items()):
        return checkpoint
    into_base = any(name is not None and layer == prefix + name for layer, name in names.items())
    kept = {layer: name or layer for layer, name in names.items() if name is not None or not into_base}

    def renamed(tensor: str) -> str:
        layer, _, suffix = tensor.rpartition(".")
        return f"{kept[layer]}.{suffix}" if layer in kept else tensor

    layout = dataclasses.replace(
        checkpoint.layout, layers={name: checkpoint.layout.layers[layer] for layer, name in kept.items()}
    )
    return PackedCheckpoint(layout, {renamed(name): stored for name, stored in checkpoint.tensors.items()})
