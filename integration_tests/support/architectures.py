# SPDX-License-Identifier: Apache-2.0
"""Every denoiser class that diffusers exports: a tiny model of it, and inputs.

`architectures.json` holds, per class, the arguments of a tiny model and a description of inputs that fit. They follow
diffusers' own model tests (Apache-2.0), which its wheel does not contain, where those have the class.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch.utils._pytree import tree_leaves


FILE = Path(__file__).with_suffix(".json")
PACKAGES = ("diffusers.models.transformers.", "diffusers.models.unets.", "diffusers.models.controlnets.")


def exported_classes() -> Iterator[type[ModelMixin]]:
    """Transformers, UNets and ControlNets that can be imported from diffusers, by name."""
    for name in sorted(dir(diffusers)):
        value = getattr(diffusers, name, None)
        if isinstance(value, type) and issubclass(value, ModelMixin) and value.__module__.startswith(PACKAGES):
            yield value


@functools.cache
def descriptions() -> dict[str, Any]:
    """Class name → `{"config": ..., "inputs": ...}`."""
    return json.loads(FILE.read_text())


def build(name: str) -> ModelMixin:
    """A tiny model with random weights. What the class sets to zero is random too, so that every layer matters."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**descriptions()[name]["config"]).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def inputs(name: str) -> dict[str, Any]:
    """Inputs for [`build`]'s model, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {key: _decode(value, generator) for key, value in descriptions()[name]["inputs"].items()}


@torch.no_grad()
def run(name: str, model: ModelMixin) -> torch.Tensor:
    """Everything the model returns, flattened."""
    torch.manual_seed(0)
    output = model(**inputs(name))
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return torch.cat([leaf.flatten().float() for leaf in leaves if isinstance(leaf, torch.Tensor)])


def _decode(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode(part, generator) for key, part in content.items()}
    if kind == "pairs":  # a dict whose keys are not strings
        return {key: _decode(part, generator) for key, part in content}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decode(part, generator) for part in content)
    return _tensor(generator=generator, **content)


def _tensor(
    shape: list[int],
    dtype: str,
    generator: torch.Generator,
    fill: float | None = None,
    values: list[float] | None = None,
    integers: int | None = None,
) -> torch.Tensor:
    to = getattr(torch, dtype)
    if fill is not None:
        return torch.full(shape, fill, dtype=to)
    if values is not None:
        return torch.tensor(values, dtype=to).view(shape)
    if integers is not None:
        return torch.randint(integers, shape, generator=generator).to(to)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(to)
