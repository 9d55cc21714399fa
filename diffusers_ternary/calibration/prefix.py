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


class QuantizedPrefix:
    """Context manager: inside, the solved layers of a model are packed; afterward they are the float modules again.

    Args:
        model (`nn.Module`): the float denoiser.
        config ([`TernaryConfig`]): gives the dtypes of the products.
        solved (`Mapping[str, SolvedLayer]`): by module name.
    """

    def __init__(self, model: nn.Module, config: TernaryConfig, solved: Mapping[str, SolvedLayer]) -> None:
        self._model = model
        self._config = config
        self._solved = solved
        self._originals: dict[str, nn.Module] = {}

    def __enter__(self) -> "QuantizedPrefix":
        try:
            for name, solved in self._solved.items():
                module = self._model.get_submodule(name)
                assert isinstance(module, FLOAT_TYPES)
                layer = placeholder_for(module, solved.weight.spec, self._config)
                assert isinstance(layer, TernaryLayer)
                solved.install(layer, module)
                self._model.set_submodule(name, layer)
                self._originals[name] = module
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._exchange(self._originals)
        self._originals = {}

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the float modules are back for a while."""
        packed = {name: self._model.get_submodule(name) for name in self._originals}
        self._exchange(self._originals)
        try:
            yield
        finally:
            self._exchange(packed)

    def _exchange(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            self._model.set_submodule(name, module)
