# SPDX-License-Identifier: Apache-2.0
"""`fuse_qkv_projections` of packed models: the fused layer holds the packed rows of query, key and value.

A fused projection is a copy: plans and files leave it out, and whatever changes layers works on the originals, while
they are the ones that run ([`with_separate_projections`]).
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from ..layers import QuantizedLayer, concatenate_rows
from .compat import FUSED_PROJECTIONS, wrap_fuse_projections


logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
RecordT = TypeVar("RecordT")


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


def copied_projections(names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Fused projections among the names of modules, with the names of the layers they are copies of."""
    found = {}
    for name in names:
        attention, dot, layer = name.rpartition(".")
        sources = tuple(f"{attention}{dot}{source}" for source in FUSED_PROJECTIONS.get(layer, ()))
        if sources and all(source in names for source in sources):
            found[name] = sources
    return found


def with_separate_projections(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that changes layers see models, and pipelines of models, without fused projections.

    They are fused again afterward, so that the fused copies follow the layers.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        parts: list[Any] = []
        for value in (*args, *kwargs.values()):
            components = getattr(value, "components", None)  # of a pipeline
            parts += components.values() if isinstance(components, Mapping) else [value]
        with _separated([part for part in parts if isinstance(part, nn.Module)]):
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def _separated(models: list[nn.Module]) -> Iterator[None]:
    fused = [model for model in dict.fromkeys(models) if hasattr(model, "unfuse_qkv_projections") and _separate(model)]
    try:
        yield
    finally:
        for model in fused:
            enable_fused_projections(model)
            try:
                model.fuse_qkv_projections()  # type: ignore[operator] # a method of diffusers' models
            except ValueError as error:
                _separate(model)
                logger.warning("The projections of %s stay separate: %s", type(model).__name__, error)


def _separate(model: Any) -> bool:
    """Undoes `fuse_qkv_projections` and drops the copies; returns whether they were in use."""
    copies = copied_projections(dict(model.named_modules()))
    attentions = {name: model.get_submodule(name.rpartition(".")[0]) for name in copies}
    in_use = any(_runs_fused(attention) for attention in attentions.values())
    if in_use:
        model.unfuse_qkv_projections()
    for name, attention in attentions.items():
        # The older attention class keeps them, after unfusing too.
        vars(attention)["_modules"].pop(name.rpartition(".")[2], None)
    return in_use


def _runs_fused(attention: Any) -> bool:
    if hasattr(attention, "unfuse_projections"):
        return bool(attention.fused_projections)
    return "Fused" in type(getattr(attention, "processor", None)).__name__


def without_fused_projections(
    state_dict: Mapping[str, torch.Tensor], records: Mapping[str, RecordT]
) -> tuple[dict[str, torch.Tensor], dict[str, RecordT]]:
    """Leaves out fused projections, whose rows are in the state dict under their own names as well.

    Raises:
        ValueError: if a fused projection was changed since, by an adapter that was merged into it.
    """
    layers = dict.fromkeys(name.rpartition(".")[0] for name in state_dict)
    copies = copied_projections(layers)
    for copy, sources in copies.items():
        if not _is_copy(state_dict, copy, sources):
            raise ValueError(
                f"{copy} holds other weights than {', '.join(sources)}, of which fuse_qkv_projections() made it, and "
                "only those are stored: an adapter was merged into it. Load the model again, and give adapters to "
                "the separate layers, or call unfuse_qkv_projections() to save the model without the adapter."
            )
    tensors = {name: tensor for name, tensor in state_dict.items() if name.rpartition(".")[0] not in copies}
    return tensors, {name: record for name, record in records.items() if name not in copies}


def _is_copy(state_dict: Mapping[str, torch.Tensor], copy: str, sources: tuple[str, ...]) -> bool:
    """Whether the rows of the copy are still those of its sources, as far as they can be compared."""
    unpacked = [state_dict[f"{name}.weight"].is_floating_point() for name in (copy, *sources)]
    if f"{copy}.fused_weight" in state_dict or (unpacked[0] and not any(unpacked[1:])):
        return False
    if any(unpacked[1:]) and not unpacked[0]:
        return True  # adapters were merged into a source since, which then counts
    for suffix in ("weight", "weight_scale", "weight_multiplier", "bias", "low_rank_down"):
        own = state_dict.get(f"{copy}.{suffix}")
        rows = [state_dict[name] for source in sources if (name := f"{source}.{suffix}") in state_dict]
        if any(tensor.is_meta for tensor in (*rows, *([] if own is None else [own]))):
            continue
        if len({tensor.dtype for tensor in (*rows, *([] if own is None else [own]))}) > 1:
            continue  # scales of several dtypes were joined as float32
        if (own is None) != (not rows) or (own is not None and not torch.equal(own, torch.cat(rows))):
            return False
    return True
