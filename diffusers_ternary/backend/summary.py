# SPDX-License-Identifier: Apache-2.0
"""The packed layers of a model: which they are, what they count, and a few lines on them for the log."""

import collections
from collections.abc import Mapping

from torch import nn

from ..format import Int8Spec, TernarySpec
from ..layers import QuantizedConv2d, QuantizedLayer
from .sizes import bits_per_weight


def packed_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def has_packed_layers(module: nn.Module) -> bool:
    """Whether a module is a packed layer, or has some."""
    return any(isinstance(part, QuantizedLayer) for part in module.modules())


def count_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """The parameters that the float model would have: a packed weight counts its N x K values, not its bytes.

    Scales, multipliers, corrections and fused weights stand for no parameters of their own. The arguments are those of
    `num_parameters` in diffusers and transformers.
    """
    layers = packed_layers(model)
    embeddings = {id(part.weight) for part in model.modules() if exclude_embeddings and isinstance(part, nn.Embedding)}
    stored = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
    stored -= {id(layer.bias) for layer in layers.values()}
    total = 0 if only_trainable else sum(layer.spec.weights for layer in set(layers.values()))
    for parameter in model.parameters():
        counted = id(parameter) not in stored and id(parameter) not in embeddings
        if counted and (parameter.requires_grad or not only_trainable):
            total += parameter.numel()
    return total


def summarize(model: nn.Module, kept: Mapping[str, str]) -> str:
    """One paragraph: what was converted, what was kept and why, and the bits per weight reached."""
    layers = packed_layers(model)
    specs = {name: layer.spec for name, layer in layers.items()}
    convolutions = sum(isinstance(layer, QuantizedConv2d) for layer in layers.values())
    ternary = sum(isinstance(spec, TernarySpec) for spec in specs.values())
    int8 = sum(isinstance(spec, Int8Spec) for spec in specs.values())
    reasons = collections.Counter(kept.values())
    kept_text = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    kinds = f"{ternary} ternary" + (f", {int8} int8" if int8 else "")
    return (
        f"{type(model).__name__}: {kinds} layers{f' ({convolutions} convolutions)' if convolutions else ''} at "
        f"{bits_per_weight(specs):.3f} bits per weight; layers kept: {kept_text}."
    )
