# SPDX-License-Identifier: Apache-2.0
"""The quantized prefix: solved layers that are put into the float denoiser while the next ones are measured."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..backend import placeholder_for
from ..backend.config import TernaryConfig
from ..layers import FLOAT_TYPES, TernaryLayer
from .solver import SolvedLayer
from .statistics import InputGroup


_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def split_stages(groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups of the same block together, in the order in which the blocks are first called."""
    stages: dict[str, list[InputGroup]] = {}
    for group in groups:
        match = _BLOCK.match(group.layers[0])
        stages.setdefault(match[1] if match else "", []).append(group)
    return list(stages.values())


def install_solved(layer: TernaryLayer, module: nn.Module, solved: SolvedLayer) -> None:
    """Fills a placeholder with a solved weight, and with the bias of the float `module` and its change."""
    layer.install_weight(solved.weight)
    if solved.bias_change is not None:
        bias = module.get_parameter("bias").detach()
        changed = (bias.float() + solved.bias_change).to(bias.dtype)
        layer.bias = nn.Parameter(changed, requires_grad=False)


def solved_on(solved: SolvedLayer, device: torch.device | str) -> SolvedLayer:
    """The solution with its tensors on a device."""
    change = None if solved.bias_change is None else solved.bias_change.to(device)
    return dataclasses.replace(solved, weight=solved.weight.to(device), bias_change=change)


@contextlib.contextmanager
def quantized_prefix(model: nn.Module, config: TernaryConfig, solved: Mapping[str, SolvedLayer]) -> Iterator[None]:
    """Inside, the solved layers of the model are packed; afterwards they are the float modules again.

    Args:
        model (`nn.Module`): the float denoiser.
        config ([`TernaryConfig`]): gives the dtypes of the products.
        solved (`Mapping[str, SolvedLayer]`): by module name.
    """
    originals = {name: model.get_submodule(name) for name in solved}
    try:
        for name, module in originals.items():
            assert isinstance(module, FLOAT_TYPES)
            found = solved_on(solved[name], module.weight.device)
            layer = placeholder_for(module, found.weight.spec, config)
            assert isinstance(layer, TernaryLayer)
            install_solved(layer, module, found)
            model.set_submodule(name, layer)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
