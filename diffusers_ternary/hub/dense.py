# SPDX-License-Identifier: Apache-2.0
"""A bfloat16 copy of a packed model, which stock diffusers or transformers loads without this package."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save_file

from ..backend.checkpoint import load_tensor, owner, to_memory
from ..files import read_json
from ..format import Int8Spec
from ..interop.foreign_model import empty_model
from ..layers import Int8Linear, TernaryLinear
from .source import PackedModel


VARIANT = "bf16"
SHARD_BYTES = 5 * 10**9
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclasses.dataclass(frozen=True)
class DenseTensor:
    """A tensor of the copy: a kept one under its own name, or the weight of a packed layer."""

    name: str
    bytes: int
    layer: str | None = None


def write_dense_copy(
    model: PackedModel, destination: pathlib.Path, *, max_shard_bytes: int = SHARD_BYTES
) -> list[pathlib.Path]:
    """Writes config and weights; packed weights are formed in float32 and rounded once to bfloat16.

    Kept tensors stay as they are. Memory holds one shard at a time, and nothing else of the model. The files are
    named as the variant `bf16`: diffusers downloads every default weight file of a repository with a pipeline, in
    whatever folder, and variants only when asked.

    Args:
        model ([`PackedModel`]): what to copy.
        destination (`Path`): folder to write; made if it does not exist.
        max_shard_bytes (`int`): largest file; a single larger tensor gets a file of its own.

    Returns:
        `list[Path]`: the files written.
    """
    destination.mkdir(parents=True, exist_ok=True)
    config = read_json(model.folder / "config.json") or {}
    config.pop("quantization_config", None)
    written = [destination / "config.json"]
    written[0].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shapes = float_shapes(model)
    stem = _SHARD.sub("", min(pathlib.Path(tensor.file).stem for tensor in model.tensors.values()))
    shards = list(_plan(model, max_shard_bytes))
    count = len(shards)
    numbers = [""] if count == 1 else [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    names = [f"{stem}.{VARIANT}{number}.safetensors" for number in numbers]
    for name, shard in zip(names, shards, strict=True):
        save_file(
            {tensor.name: _read(model, tensor, shapes) for tensor in shard}, destination / name, {"format": "pt"}
        )
        written.append(destination / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(destination / f"{stem}.safetensors.index.{VARIANT}.json")
        written[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def float_shapes(model: PackedModel) -> dict[str, torch.Size]:
    """Shapes of the packed layers' float weights, from the architecture: files store a convolution as a matrix.

    Raises:
        ValueError: if the installed libraries do not know the class, or it has no such layer.
    """
    config = read_json(model.folder / "config.json") or {}
    skeleton = empty_model({**config, "quantization_config": None}, header_shapes(model), source=model.folder)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    wrong = [
        name for name, spec in model.layout.layers.items() if _count(shapes.get(f"{name}.weight")) != spec.weights
    ]
    if wrong:
        raise ValueError(
            f"{model.folder} holds a packed layer {wrong[0]}, which {model.class_name} has not, or in another size. "
            "config.json does not fit the weights."
        )
    return {name: shapes[f"{name}.weight"] for name in model.layout.layers}


def header_shapes(model: PackedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all stored tensors."""
    return {name: stored.shape for name, stored in model.tensors.items()}


def _count(shape: torch.Size | None) -> int:
    return 0 if shape is None else shape.numel()


def dense_bytes(model: PackedModel) -> int:
    """What the copy's tensors take."""
    return sum(tensor.bytes for tensor in _tensors(model))


def _tensors(model: PackedModel) -> Iterator[DenseTensor]:
    layers = model.layout.layers
    for name, stored in model.tensors.items():
        part = owner(name, layers)
        if part is None:
            yield DenseTensor(name, stored.bytes)
        elif part[1] == "weight":
            yield DenseTensor(name, 2 * layers[part[0]].weights, layer=part[0])


def _plan(model: PackedModel, max_shard_bytes: int) -> Iterator[list[DenseTensor]]:
    shard: list[DenseTensor] = []
    for tensor in _tensors(model):
        if shard and sum(one.bytes for one in shard) + tensor.bytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    if shard:
        yield shard


def _read(model: PackedModel, tensor: DenseTensor, shapes: Mapping[str, torch.Size]) -> torch.Tensor:
    if tensor.layer is None:
        return load_tensor(model.tensors[tensor.name], tensor.name)
    return _dequantized(model, tensor.layer).reshape(shapes[tensor.layer])


def _dequantized(model: PackedModel, name: str) -> torch.Tensor:
    spec = model.layout.layers[name]
    tensors = {}
    for suffix in spec.file_tensors():
        full_name = f"{name}.{suffix}"
        stored = model.tensors[full_name]
        tensor = load_tensor(stored, full_name)
        if suffix == "weight":
            tensor = to_memory(full_name, suffix, tensor, spec, source=stored.file)
        tensors[suffix] = tensor
    # A convolution is the same matrix product.
    cls = Int8Linear if isinstance(spec, Int8Spec) else TernaryLinear
    layer = cls(spec, bias=False, device="meta", dtype=torch.bfloat16)
    layer.install(**tensors)
    return layer.dequantize(torch.bfloat16)
