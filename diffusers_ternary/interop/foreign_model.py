# SPDX-License-Identifier: Apache-2.0
"""What a reader of somebody else's format hands over, and the checks that all formats share."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..backend.folder import explained_loading, model_class


logger = logging.getLogger(__name__)
_PARAMETERS_EACH, _PARAMETERS_MORE = 4, 1000
# Sides of the squares that position tables are made for.
_SIDES = ("sample_size", "pos_embed_max_size")
_SMALL_TABLE = 1 << 22
# A tensor and its name in the host library; ternary weights are dense here, and found again by their structure.
Item = tuple[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """One model in a format that this package does not write.

    Args:
        format (`str`): for people, e.g. `"GGUF"`.
        config (`dict`): config.json of the model in diffusers' or transformers' form.
        shapes (`dict[str, tuple[int, ...]]`): tensor name in the host library → shape, from headers alone.
        items (`Callable`): reads the tensors, one at a time and as often as it is called.
        weights_name (`str`): file name without its ending.
    """

    format: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    items: Callable[[], Iterator[Item]]
    weights_name: str = "diffusion_pytorch_model"


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


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Checks that a checkpoint has the tensors that the model expects, before anything is read.

    Raises:
        ValueError: names what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted(expected.keys() - shapes.keys() - tied)
    unexpected = sorted(shapes.keys() - expected.keys())
    name = type(model).__name__
    if missing:
        raise ValueError(
            f"{source} is not a {name}: {_some(missing)} missing, {_some(unexpected)} unexpected. The weights belong "
            "to another architecture, or the file is incomplete."
        )
    if unexpected:  # as the host libraries have it: they load what they know
        logger.warning("%s holds %s that %s does not use; kept.", source, _some(unexpected), name)
    for tensor, shape in shapes.items():
        if shape != expected.get(tensor, shape):
            raise ValueError(
                f"{source}: {tensor} is {list(shape)}, but {name} with this config.json has {list(expected[tensor])}. "
                "The config belongs to another model."
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:2])}{' ...' if len(names) > 2 else ''})" if names else "none"
