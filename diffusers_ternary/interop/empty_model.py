# SPDX-License-Identifier: Apache-2.0
"""The model of a config.json without its weights, and without believing every number in it."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..backend.folder import explained_loading, model_class


_PARAMETERS_EACH, _PARAMETERS_MORE = 4, 1000
# Sides of the squares that position tables are made for.
_SIDES = ("sample_size", "pos_embed_max_size")
_SMALL_TABLE = 1 << 22


def empty_model(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, source: str | os.PathLike[str]
) -> nn.Module:
    """The model of a config.json on the meta device: its modules, names and shapes, no weights.

    Args:
        config (`Mapping`): of diffusers or transformers.
        shapes (`Mapping`): of the checkpoint's tensors. A config of far more parameters is given up while the model
            is being built: one of ten million layers is written in a line.
        source (`str` or `PathLike`): for messages.

    Raises:
        ValueError: if no installed library has the class, or the config is not one of it, or asks for far more
            parameters than the checkpoint has.
    """
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    cls = model_class(config, source=source)
    _check_sizes(config, shapes, source=source)
    # Fused and tied parameters are several in a model and one in a file.
    most = _PARAMETERS_EACH * len(shapes) + _PARAMETERS_MORE
    try:
        with explained_loading(source), _at_most(most, source=source), init_empty_weights():
            if issubclass(cls, PreTrainedModel):
                return cls(cls.config_class.from_dict(dict(config)))
            return cls.from_config(dict(config))
    except (ValueError, TypeError) as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: no {cls.__name__} can be made of config.json ({error}).") from error


@contextlib.contextmanager
def _at_most(count: int, *, source: str | os.PathLike[str]) -> Iterator[None]:
    """Stops the building of a model that has more parameters (or more modules) than that."""
    seen = 0

    def see(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 2 * count:  # modules are counted as well: some have no parameters
            raise ValueError(
                f"{source}: config.json asks for a model of more than {count} parameters, far more than the weights "
                "have. It belongs to another model, or is damaged."
            )

    hooks = (register_module_parameter_registration_hook(see), register_module_module_registration_hook(see))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_sizes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, source: str | os.PathLike[str]
) -> None:
    """Tables that are computed while a model is built, whether or not its weights are made."""
    weights = sum(math.prod(shape) for shape in shapes.values())
    for name in _SIDES:
        side = config.get(name)
        sides = side if isinstance(side, list) else [side]
        if any(isinstance(value, int) and value**2 > max(weights, _SMALL_TABLE) for value in sides):
            raise ValueError(
                f"{source}: {name}={side!r} in config.json is too large for a model of {weights} weights. It belongs "
                "to another model, or is damaged."
            )
