# SPDX-License-Identifier: Apache-2.0
"""Saves a model that is in memory into a folder, always with the same bytes."""

import json
import os
import pathlib
from typing import Any

from torch import nn

from ..backend import packed_layers


def stage(pipeline_or_model: Any, destination: pathlib.Path) -> pathlib.Path:
    """The folder of a packed pipeline or model, which is written if it is in memory.

    Args:
        pipeline_or_model: a path is returned as it is.
        destination (`Path`): where a model in memory is saved.

    Raises:
        TypeError: for anything that is not a path, no pipeline and no model with `save_pretrained`.
        ValueError: if no layer is packed.
    """
    if isinstance(pipeline_or_model, (str, os.PathLike)):
        return pathlib.Path(pipeline_or_model)
    kind = type(pipeline_or_model).__name__
    if not hasattr(pipeline_or_model, "save_pretrained"):
        raise TypeError(f"push_to_hub takes a pipeline, a model, or the folder of one, got {kind}.")
    components = getattr(pipeline_or_model, "components", {"": pipeline_or_model})
    if not any(isinstance(part, nn.Module) and packed_layers(part) for part in components.values()):
        raise ValueError(f"{kind} holds no packed layers. Quantize it first: diffusers_ternary.quantize(model)")
    pipeline_or_model.save_pretrained(destination)
    for file in destination.rglob("*.safetensors"):
        sort_metadata(file)
    return destination


def sort_metadata(file: pathlib.Path) -> None:
    """Puts the metadata of a safetensors header into alphabetical order, in place.

    safetensors writes it in the random order of a hash map: the same model, saved again, would be another file to
    the Hub, and an interrupted push would send everything a second time.
    """
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same entries take the same room; should another version of safetensors escape them otherwise, the file
        # stays as it is.
        if len(text) <= size:
            handle.seek(8)
            handle.write(text.ljust(size))
