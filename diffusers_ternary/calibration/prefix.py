# SPDX-License-Identifier: Apache-2.0
"""The quantized prefix: solved layers that are put into the float denoiser while the next ones are measured."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

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


@contextlib.contextmanager
def quantized_prefix(model: nn.Module, config: TernaryConfig, solved: Mapping[str, SolvedLayer]) -> Iterator[None]:
    """Inside, the solved layers of the model are packed; afterward they are the float modules again.

    Args:
        model (`nn.Module`): the float denoiser.
        config ([`TernaryConfig`]): gives the dtypes of the products.
        solved (`Mapping[str, SolvedLayer]`): by module name.
    """
    originals = {name: model.get_submodule(name) for name in solved}
    try:
        for name, module in originals.items():
            assert isinstance(module, FLOAT_TYPES)
            layer = placeholder_for(module, solved[name].weight.spec, config)
            assert isinstance(layer, TernaryLayer)
            solved[name].install(layer, module)
            model.set_submodule(name, layer)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
