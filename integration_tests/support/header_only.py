# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any size that take no room: the headers of safetensors files, and holes in the place of the data."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel


LIBRARIES = {True: "transformers", False: "diffusers"}


def write_pipeline(folder: Path, pipeline: str, models: Mapping[str, nn.Module]) -> Path:
    """A pipeline folder of models on the meta device, stored in 16 bits."""
    folder.mkdir(parents=True)
    index: dict[str, object] = {"_class_name": pipeline}
    for name, model in models.items():
        write_model(folder / name, model)
        index[name] = [LIBRARIES[isinstance(model, PreTrainedModel)], type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_model(folder: Path, model: nn.Module, shard_bytes: int = 10**10) -> None:
    """A model folder of bfloat16 weights."""
    folder.mkdir(parents=True)
    if isinstance(model, PreTrainedModel):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        name = "model"
    else:
        model.save_config(folder)
        name = "diffusion_pytorch_model"
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=shard_bytes, filename_pattern=f"{name}{{suffix}}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {key: tuple(state[key].shape) for key in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def _write_file(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
