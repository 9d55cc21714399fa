# SPDX-License-Identifier: Apache-2.0
"""What a reader of somebody else's format hands over, and the checks that all formats share."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)
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
