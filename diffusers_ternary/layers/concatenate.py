# SPDX-License-Identifier: Apache-2.0
"""Several packed linear layers of the same input as one."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..format import LayerSpec, TernarySpec
from .linear import QuantizedLinear
from .ternary import TernaryLayer


def concatenate_rows(layers: Mapping[str, nn.Module]) -> QuantizedLinear:
    """A layer that returns the outputs of `layers` one after another. Its tensors are theirs, row by row: exact.

    Args:
        layers (`Mapping[str, nn.Module]`): name, for messages → packed linear layer.

    Returns:
        [`QuantizedLinear`] with copies of the tensors.

    Raises:
        ValueError: if the layers are not packed alike, carry adapters, are fused, or are not in memory.
    """
    names = ", ".join(layers)
    packed = [layer for layer in layers.values() if isinstance(layer, QuantizedLinear)]
    first = packed[0] if packed else None
    if first is None or len(packed) < len(layers) or any(type(layer) is not type(first) for layer in packed):
        kinds = ", ".join(type(layer).__name__ for layer in layers.values())
        raise ValueError(
            f"{names} are {kinds}: only packed layers of one kind can be concatenated. Give them one kind in "
            "TernaryConfig(overrides=...), and unload adapters before fusing projections."
        )
    specs = [_without_rows(layer) for layer in packed]
    if any(spec != specs[0] for spec in specs) or len({layer.bias is None for layer in packed}) > 1:
        raise ValueError(f"{names} differ in more than their rows and cannot be concatenated: {specs}.")
    if any(not _same_column_scale(first, layer) for layer in packed[1:]):
        raise ValueError(
            f"{names} scale their common inputs by factors of their own (column_scales), so no layer can do the work "
            "of all. Keep the projections separate, or calibrate without column_scales."
        )
    if any(layer.is_fused for layer in packed):
        raise ValueError(f"{names} have adapters fused into them. Call unfuse_lora() before fusing projections.")
    if any(layer.weight.is_meta for layer in packed):
        raise ValueError(f"{names} are not in memory (offloaded). Fuse projections before enabling offloading.")
    return _concatenate(packed)


def _same_column_scale(first: QuantizedLinear, layer: QuantizedLinear) -> bool:
    if not isinstance(first, TernaryLayer) or not isinstance(layer, TernaryLayer):
        return True
    own, other = first.column_scale, layer.column_scale
    return own is None or other is None or torch.equal(own, other)


def _without_rows(layer: QuantizedLinear) -> tuple[object, ...]:
    if isinstance(layer.spec, TernarySpec):
        spec: LayerSpec = dataclasses.replace(layer.spec, out_features=1, rank=0)
    else:
        spec = dataclasses.replace(layer.spec, out_features=1)
    return spec, layer.activation_dtype, layer.compute_dtype


def _concatenate(layers: list[QuantizedLinear]) -> QuantizedLinear:
    first = layers[0]
    spec = dataclasses.replace(first.spec, out_features=sum(layer.out_features for layer in layers))
    scales = [layer.scales for layer in layers]
    if len({scale.dtype for scale in scales}) > 1:
        scales = [scale.float() for scale in scales]  # float16 and bfloat16 have no common 16-bit type
    tensors = {"weight": torch.cat([layer.weight.detach() for layer in layers]), "weight_scale": torch.cat(scales)}
    ternary = [layer for layer in layers if isinstance(layer, TernaryLayer)]
    if ternary:
        multipliers = [layer.weight_multiplier.detach() for layer in ternary if layer.weight_multiplier is not None]
        if multipliers:
            tensors["weight_multiplier"] = torch.cat(multipliers)
        if ternary[0].column_factors is not None:
            tensors["column_scale"] = ternary[0].column_factors.detach().clone()
        tensors |= _low_rank(ternary)
        spec = dataclasses.replace(ternary[0].spec, out_features=spec.out_features, rank=_rank(ternary))
    joined = type(first)(
        spec,
        bias=False,
        activation_dtype=first.activation_dtype,
        compute_dtype=first.compute_dtype,
        device="meta",
        dtype=first.float_dtype,
    )
    joined.install(spec, tensors)
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    joined.train(first.training)
    return joined


def _rank(layers: Sequence[TernaryLayer]) -> int:
    return sum(layer.spec.rank for layer in layers)


def _low_rank(layers: Sequence[TernaryLayer]) -> dict[str, torch.Tensor]:
    """Corrections side by side: each layer's rows see its own part of the inner dimension only."""
    corrections = [layer.low_rank for layer in layers]
    dtype = next((correction.up.dtype for correction in corrections if correction is not None), None)
    if dtype is None:
        return {}
    ups, downs = [], []
    for layer, correction in zip(layers, corrections, strict=True):
        empty = torch.empty(layer.spec.out_features, 0, dtype=dtype, device=layer.weight.device)
        ups.append(empty if correction is None else correction.up)
        downs.append(empty.new_empty(0, layer.spec.in_features) if correction is None else correction.down)
    return {"low_rank_up": torch.block_diag(*ups), "low_rank_down": torch.cat(downs)}
