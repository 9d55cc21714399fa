# SPDX-License-Identifier: Apache-2.0
"""What files in somebody else's format hold, for `inspect`; headers only."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open

from ..backend import StoredTensor
from ..ternarize import recover
from .clark import CODES, is_clark
from .gguf_import import architecture_field, open_reader
from .tensor_files import StateDictFile
from .two_bit import find_state_dict, is_two_bit


# Of a float tensor, when its values are looked at: this many rows.
_SAMPLE_ROWS = 4
_PLAIN_GGUF = ("F32", "F16", "BF16", "F64")


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A tensor, or all tensors of a quantized layer.

    Args:
        name (`str`): of the layer or tensor, as the file has it.
        kind (`str`): e.g. `"gemlite 2-bit"`, `"tq2_0"`, or the dtype of a tensor that is not quantized.
        quantized (`bool`): whether it is the weight of a quantized layer.
        shape (`tuple[int, ...]`): of the weight.
        bytes (`int`): stored for it.
    """

    name: str
    kind: str
    quantized: bool
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class ForeignContents:
    """One checkpoint in a format of others: its name for people and its weights."""

    format: str
    weights: tuple[StoredWeight, ...]


def gguf_contents(path: pathlib.Path) -> ForeignContents:
    """Contents of a GGUF file of any architecture."""
    reader = open_reader(path)
    weights = [
        StoredWeight(
            name=tensor.name,
            kind=tensor.tensor_type.name.lower(),
            quantized=tensor.tensor_type.name not in _PLAIN_GGUF,
            shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
            bytes=int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    ]
    return ForeignContents(f"GGUF, {architecture_field(reader) or 'no architecture stated'}", tuple(weights))


def state_dict_contents(folder: pathlib.Path) -> ForeignContents | None:
    """Contents of the 2-bit state dict in a folder of gemlite or HQQ, or `None` if it has none."""
    file = find_state_dict(folder)
    if file is None:
        return None
    values = StateDictFile(file).values
    sizes = {name: _nbytes(value) for name, value in values.items()}
    shapes = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else () for name, value in values.items()}
    dtypes = {name: str(getattr(value, "dtype", "")).removeprefix("torch.") for name, value in values.items()}

    def weight_shape(layer: str) -> tuple[int, ...]:
        value = values.get(f"{layer}.orig_shape", values.get(f"{layer}.shape"))
        return tuple(int(size) for size in torch.as_tensor(value).tolist()) if value is not None else ()

    layers = {name.removesuffix(".W_q"): weight_shape(name.removesuffix(".W_q")) for name in values if _is_code(name)}
    kind = "gemlite 2-bit" if any(name.endswith(".metadata") for name in values) else "HQQ"
    return ForeignContents(kind, tuple(_grouped(layers, kind, sizes, shapes, dtypes, ".")))


def safetensors_contents(tensors: Mapping[str, StoredTensor]) -> ForeignContents | None:
    """Contents of a Clark pack or of a gemlite or HQQ state dict in safetensors files; `None` if it is neither."""
    names = list(tensors)
    if not is_clark(names) and not is_two_bit(names):
        return None
    sizes = {name: stored.bytes for name, stored in tensors.items()}
    shapes = {name: stored.shape for name, stored in tensors.items()}
    dtypes = {name: stored.dtype.lower() for name, stored in tensors.items()}
    layers: dict[str, tuple[int, ...]]
    if is_clark(names):
        layers = {
            name.removesuffix(CODES): (stored.shape[0], 4 * stored.shape[1])
            for name, stored in tensors.items()
            if name.endswith(CODES)
        }
        return ForeignContents("Clark pack", tuple(_grouped(layers, "Clark 2-bit", sizes, shapes, dtypes, "::")))
    coded = [name.removesuffix(".W_q") for name in names if _is_code(name)]
    layers = {layer: _stored_shape(tensors, layer) for layer in coded}
    kind = "gemlite 2-bit" if any(name.endswith(".metadata") for name in names) else "HQQ"
    return ForeignContents(kind, tuple(_grouped(layers, kind, sizes, shapes, dtypes, ".")))


def holds_ternary_values(stored: StoredTensor, name: str) -> bool:
    """Whether a few rows of a float tensor are ternary: an unpacked model, which `convert` makes small."""
    if len(stored.shape) != 2 or stored.dtype not in ("F32", "F16", "BF16"):
        return False
    with safe_open(stored.file, framework="pt") as handle:
        middle = stored.shape[0] // 2
        rows = handle.get_slice(name)[middle : middle + _SAMPLE_ROWS]
    return bool(rows.any()) and recover(rows) is not None


def _is_code(name: str) -> bool:
    return name.endswith(".W_q")


def _nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _stored_shape(tensors: Mapping[str, StoredTensor], layer: str) -> tuple[int, ...]:
    stored = tensors.get(f"{layer}.orig_shape") or tensors.get(f"{layer}.shape")
    if stored is None:
        return ()
    with safe_open(stored.file, framework="pt") as handle:
        name = f"{layer}.orig_shape" if f"{layer}.orig_shape" in tensors else f"{layer}.shape"
        return tuple(int(size) for size in handle.get_tensor(name).tolist())


def _grouped(
    layers: Mapping[str, tuple[int, ...]],
    kind: str,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    separator: str,
) -> Iterable[StoredWeight]:
    """Tensors gathered by the layer they belong to; biases and all others by themselves."""
    total: collections.Counter[str] = collections.Counter()
    for name, size in sizes.items():
        layer, _, part = name.partition(separator) if separator != "." else name.rpartition(".")
        while separator == "." and layer and layer not in layers:
            layer = layer.rpartition(".")[0]
        if layer in layers and part and part != "bias":
            total[layer] += size
        elif math.prod(shapes[name]) and dtypes[name]:
            yield StoredWeight(name, dtypes[name], False, shapes[name], size)
    for layer, shape in layers.items():
        yield StoredWeight(layer, kind, True, shape, total[layer])
