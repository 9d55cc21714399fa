# SPDX-License-Identifier: Apache-2.0
"""What the files of one checkpoint hold, in this package's format or in one of others; headers only."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from safetensors import safe_open

from ..backend import StoredTensor, check_headers, read_headers
from ..backend.checkpoint import owner
from ..format import FileLayout, Int8Spec, LayerSpec
from ..ternarize import recover
from .clark import CODES, clark_owner, is_clark
from .gguf_import import architecture_field, gguf_shape, open_reader
from .tensor_files import SafetensorsFiles, StateDictFile, TensorFiles
from .two_bit import FILES as STATE_DICTS
from .two_bit import is_two_bit, two_bit_kind, two_bit_owner, two_bit_shapes


UNPACKED = "holds ternary values"
# Of a float tensor, when its values are looked at: this many rows.
_SAMPLE_ROWS = 4
_PLAIN_GGUF = ("F32", "F16", "BF16", "F64")
# The layer that a tensor belongs to and its name there; `None` and the whole name if it belongs to none.
_Owner = Callable[[str, Mapping[str, tuple[int, ...]]], tuple[str | None, str]]


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A tensor, or all tensors of a quantized layer.

    Args:
        name (`str`): of the layer or tensor, as the file has it.
        kind (`str`): e.g. `"ternary g128 double"`, `"gemlite 2-bit"`, `"tq2_0"`, or the dtype of a tensor that is not
            quantized.
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
class Contents:
    """One checkpoint.

    Args:
        weights (`tuple[StoredWeight, ...]`): all that it stores.
        format (`str`, *optional*): name of a format of others, e.g. `"GGUF, flux"`, or `UNPACKED`.
        format_version (`int`, *optional*): of the packed format.
    """

    weights: tuple[StoredWeight, ...]
    format: str | None = None
    format_version: int | None = None


def read_contents(files: list[pathlib.Path]) -> Contents:
    """Contents of one checkpoint: the shards of safetensors, or one file of another format.

    Raises:
        ValueError: if a file is damaged, or shards are missing.
    """
    if files[0].suffix == ".gguf":
        return _gguf(files[0])
    if files[0].name in STATE_DICTS:
        return _two_bit(StateDictFile(files[0]))
    layout, tensors = read_headers(files)
    if layout is not None:
        check_headers(layout, tensors, source=str(files[0].parent))
        return _packed(layout, tensors)
    if is_clark(tensors):
        layers = {
            name.removesuffix(CODES): (stored.shape[0], 4 * stored.shape[1])
            for name, stored in tensors.items()
            if name.endswith(CODES)
        }
        return Contents(tuple(_grouped(tensors, layers, "Clark 2-bit", clark_owner)), "Clark pack")
    if is_two_bit(tensors):
        return _two_bit(SafetensorsFiles(files))
    weights = tuple(_plain(name, stored) for name, stored in tensors.items())
    return Contents(weights, UNPACKED if _holds_ternary_values(tensors) else None)


def _plain(name: str, stored: StoredTensor) -> StoredWeight:
    return StoredWeight(name, stored.dtype.lower(), False, stored.shape, stored.bytes)


def _packed(layout: FileLayout, tensors: Mapping[str, StoredTensor]) -> Contents:
    layers = {
        name: StoredWeight(
            name,
            _kind(spec),
            True,
            (spec.out_features, spec.in_features),
            sum(tensors[f"{name}.{part}"].bytes for part in spec.file_tensors()),
        )
        for name, spec in layout.layers.items()
    }
    kept = (_plain(name, stored) for name, stored in tensors.items() if owner(name, layout.layers) is None)
    return Contents((*layers.values(), *kept), format_version=layout.format_version)


def _kind(spec: LayerSpec) -> str:
    if isinstance(spec, Int8Spec):
        return "int8"
    grouping = "per row" if spec.groups == 1 else f"g{spec.group_size} {spec.scales}"
    return f"ternary {grouping}"


def _gguf(path: pathlib.Path) -> Contents:
    """Of a file of any architecture."""
    reader = open_reader(path)
    weights = tuple(
        StoredWeight(
            tensor.name,
            tensor.tensor_type.name.lower(),
            tensor.tensor_type.name not in _PLAIN_GGUF,
            gguf_shape(tensor),
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    )
    return Contents(weights, f"GGUF, {architecture_field(reader) or 'no architecture stated'}")


def _two_bit(files: TensorFiles) -> Contents:
    kind = two_bit_kind(files)
    return Contents(tuple(_grouped(files.stored, two_bit_shapes(files), kind, two_bit_owner)), kind)


def _grouped(
    tensors: Mapping[str, StoredTensor], layers: Mapping[str, tuple[int, ...]], kind: str, owner_of: _Owner
) -> Iterable[StoredWeight]:
    """Tensors gathered by the layer they belong to; biases and all others by themselves."""
    total: collections.Counter[str] = collections.Counter()
    for name, stored in tensors.items():
        layer, part = owner_of(name, layers)
        if layer is not None and part != "bias":
            total[layer] += stored.bytes
        elif math.prod(stored.shape):
            yield _plain(name, stored)
    for layer, shape in layers.items():
        yield StoredWeight(layer, kind, True, shape, total[layer])


def _holds_ternary_values(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a few rows of some float tensor are ternary: an unpacked model, which `convert` makes small."""
    return any(_is_ternary(stored, name) for name, stored in _one_of_each(tensors))


def _one_of_each(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for name, stored in tensors.items():
        key = (pattern_of(name), stored.shape)
        if key not in seen:
            seen.add(key)
            yield name, stored


def _is_ternary(stored: StoredTensor, name: str) -> bool:
    if len(stored.shape) != 2 or stored.dtype not in ("F32", "F16", "BF16"):
        return False
    with safe_open(stored.file, framework="pt") as handle:
        middle = stored.shape[0] // 2
        rows = handle.get_slice(name)[middle : middle + _SAMPLE_ROWS]
    return bool(rows.any()) and recover(rows) is not None


def pattern_of(name: str) -> str:
    """A module's or tensor's name, numbers of blocks as `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
