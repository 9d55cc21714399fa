# SPDX-License-Identifier: Apache-2.0
"""A bfloat16 copy of a packed model, which stock diffusers or transformers loads without this package."""

import math
import pathlib
import re

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ..backend.packed_folder import PackedFolder
from ..files import write_json
from ..interop.empty_model import empty_model


VARIANT = "bf16"
SHARD_BYTES = 5 * 10**9
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def write_dense_copy(
    model: PackedFolder, destination: pathlib.Path, *, max_shard_bytes: int = SHARD_BYTES
) -> list[pathlib.Path]:
    """Writes config and weights; packed weights are formed in float32 and rounded once to bfloat16.

    Kept tensors stay as they are. Memory holds one shard at a time, and nothing else of the model. The files are
    named as the variant `bf16`: diffusers downloads every default weight file of a repository with a pipeline, in
    whatever folder, and variants only when asked.

    Args:
        model ([`PackedFolder`]): what to copy.
        destination (`Path`): folder to write; made if it does not exist.
        max_shard_bytes (`int`): largest file; a single larger tensor gets a file of its own.

    Returns:
        `list[Path]`: the files written.
    """
    destination.mkdir(parents=True, exist_ok=True)
    written = [destination / "config.json"]
    write_json(written[0], model.config)
    shapes = float_shapes(model)
    stem = _SHARD.sub("", min(pathlib.Path(tensor.file).stem for tensor in model.tensors.values()))
    split = split_state_dict_into_shards_factory(
        _sizes(model),
        get_storage_size=lambda size: size,
        filename_pattern=f"{stem}.{VARIANT}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {
            name: model.read(name)
            if model.spec(name) is None
            else model.dequantize(name, torch.bfloat16).reshape(shapes[name])
            for name in names
        }
        save_file(tensors, destination / file, {"format": "pt"})
        written.append(destination / file)
    if split.is_sharded:
        written.append(destination / f"{stem}.safetensors.index.{VARIANT}.json")
        write_json(written[-1], {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return written


def float_shapes(model: PackedFolder) -> dict[str, torch.Size]:
    """Shapes of the packed layers' float weights, from the architecture: files store a convolution as a matrix.

    Raises:
        ValueError: if the installed libraries do not know the class, or it has no such layer.
    """
    stored = {name: tensor.shape for name, tensor in model.tensors.items()}
    skeleton = empty_model(model.config, stored, source=model.path)
    known = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    shapes = {f"{layer}.weight": known.get(f"{layer}.weight", torch.Size((0,))) for layer in model.layout.layers}
    for layer, spec in model.layout.layers.items():
        if math.prod(shapes[f"{layer}.weight"]) != spec.weights:
            raise ValueError(
                f"{model.path} holds a packed layer {layer}, which {model.class_name} has not, or in another size. "
                "config.json does not fit the weights."
            )
    return shapes


def dense_bytes(model: PackedFolder) -> int:
    """What the copy's tensors take."""
    return sum(_sizes(model).values())


def _sizes(model: PackedFolder) -> dict[str, int]:
    """Bytes of the copy's tensors, in the order of the packed files."""
    specs = {name: model.spec(name) for name in sorted(model.names())}
    return {name: model.tensors[name].bytes if spec is None else 2 * spec.weights for name, spec in specs.items()}
