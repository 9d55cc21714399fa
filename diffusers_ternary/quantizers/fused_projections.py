# SPDX-License-Identifier: Apache-2.0
"""`fuse_qkv_projections` of packed models: the fused layer holds the packed rows of query, key and value."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..compat import FUSED_PROJECTIONS, wrap_fuse_projections
from ..layers import QuantizedLayer, concatenate_rows


def enable_fused_projections(model: nn.Module) -> None:
    """Makes the attention classes in `model` fuse packed projections too. Float ones are fused as ever."""
    for cls in {type(module) for module in model.modules() if hasattr(module, "fuse_projections")}:
        wrap_fuse_projections(cls, _fuse_packed)


def _fuse_packed(attention: Any, fuse: Any) -> None:
    """diffusers decides what is fused, on stand-ins without memory; each fused stand-in is then built from rows."""
    sources = dict.fromkeys(name for names in FUSED_PROJECTIONS.values() for name in names)
    layers = {name: getattr(attention, name) for name in sources if getattr(attention, name, None) is not None}
    if not any(isinstance(_base(layer), QuantizedLayer) for layer in layers.values()):
        fuse()
        return
    joined = {}
    try:
        for name, layer in layers.items():
            rows, columns = _base(layer).out_features, _base(layer).in_features
            setattr(attention, name, nn.Linear(columns, rows, bias=layer.bias is not None, device="meta"))
        fuse()
        for fused, names in FUSED_PROJECTIONS.items():
            if getattr(getattr(attention, fused, None), "weight", torch.empty(0)).is_meta:
                joined[fused] = concatenate_rows({name: layers[name] for name in names})
    except ValueError:
        attention.fused_projections = False
        for fused in FUSED_PROJECTIONS:
            if getattr(getattr(attention, fused, None), "weight", torch.empty(0)).is_meta:
                delattr(attention, fused)
        raise
    finally:
        for name, layer in layers.items():
            setattr(attention, name, layer)
    for fused, layer in joined.items():
        setattr(attention, fused, layer)


def _base(layer: Any) -> Any:
    """The layer below an adapter."""
    return getattr(layer, "base_layer", layer)


def without_fused_projections(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out fused projections, whose rows are in the state dict under their own names as well."""

    def is_copy(name: str) -> bool:
        attention, _, layer = name.rpartition(".")[0].rpartition(".")
        sources = FUSED_PROJECTIONS.get(layer, ())
        return bool(sources) and all(f"{attention}.{source}.weight" in state_dict for source in sources)

    return {name: tensor for name, tensor in state_dict.items() if not is_copy(name)}
