# SPDX-License-Identifier: Apache-2.0
"""What a folder or file of weights holds, read from headers only."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..backend import StoredTensor, check_headers, read_headers
from ..format import FileLayout, Int8Spec, LayerSpec
from .contents import ForeignContents, gguf_contents, holds_ternary_values, safetensors_contents, state_dict_contents
from .open_foreign import named_errors
from .two_bit import FILES as STATE_DICTS


SUFFIXES = (".safetensors", ".gguf")
UNPACKED = "holds ternary values"


@dataclasses.dataclass(frozen=True)
class Row:
    """Layers of the same name pattern, kind and shape.

    Args:
        name (`str`): module names with block numbers as `*`, or `"(kept)"` for tensors of unquantized modules.
        kind (`str`): `"ternary g128 double"`, `"int8"`, or the stored dtype of kept tensors.
        count (`int`): layers, or tensors where kept.
        shape (`tuple[int, int]`, *optional*): `[out_features, in_features]`.
        weights (`int`): values stored.
        bytes (`int`): bytes in the file, scales included.
    """

    name: str
    kind: str
    count: int
    shape: tuple[int, int] | None
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales included."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Component:
    """One model: a folder with weights, or a single file.

    Args:
        name (`str`): folder relative to the inspected path.
        rows (`tuple[Row, ...]`): what it stores.
        format_version (`int`, *optional*): of the packed format; `None` for a float model.
        format (`str`, *optional*): name of a format of others, e.g. `"GGUF, flux"`; `"holds ternary values"` for a
            float model that `convert` packs without loss.
    """

    name: str
    rows: tuple[Row, ...]
    format_version: int | None
    format: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_16bit(self) -> int:
        """Bytes of the same values in 16 bits."""
        return sum(2 * row.weights for row in self.rows)

    @property
    def packed_bits_per_weight(self) -> float | None:
        """Stored bits per converted weight; `None` without any."""
        packed = [row for row in self.rows if row.shape is not None]
        weights = sum(row.weights for row in packed)
        return 8 * sum(row.bytes for row in packed) / weights if weights else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        rows = [{**dataclasses.asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.rows]
        return {
            "name": self.name,
            "format_version": self.format_version,
            "format": self.format,
            "bytes": self.bytes,
            "bytes_16bit": self.bytes_16bit,
            "packed_bits_per_weight": self.packed_bits_per_weight,
            "rows": rows,
        }


def inspect_path(path: str | pathlib.Path) -> list[Component]:
    """Describes every model below a path.

    Args:
        path (`str` or `Path`): a pipeline folder, a model folder, a safetensors or a GGUF file.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there are no such files, or one is damaged or incomplete.
    """
    root = pathlib.Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist. Give a folder with safetensors or GGUF files, or one file.")
    files = [root] if root.is_file() else _model_files(root)
    if not files or any(file.suffix not in SUFFIXES and file.name not in STATE_DICTS for file in files):
        raise ValueError(f"{root} holds no safetensors or GGUF files, and other formats are not read.")
    folders: dict[tuple[pathlib.Path, str], list[pathlib.Path]] = collections.defaultdict(list)
    for file in files:
        folders[file.parent, _checkpoint_name(file)].append(file)  # other formats: one file each
    several = collections.Counter(folder for folder, _ in folders)
    components = []
    for (folder, name), shards in folders.items():
        with named_errors(shards[0]):
            components.append(_describe(_component_name(root, folder, name if several[folder] > 1 else ""), shards))
    return components


def _model_files(root: pathlib.Path) -> list[pathlib.Path]:
    patterns = [*(f"*{suffix}" for suffix in SUFFIXES), *STATE_DICTS]
    return sorted(file for pattern in patterns for file in root.rglob(pattern))


def _checkpoint_name(file: pathlib.Path) -> str:
    # The shards of one checkpoint belong together; another variant in the same folder is another checkpoint.
    stem = re.sub(r"-\d{5}-of-\d{5}", "", file.stem)
    return stem if file.suffix == ".safetensors" else file.name


def _component_name(root: pathlib.Path, folder: pathlib.Path, name: str) -> str:
    if root.is_file():
        return root.name
    relative = folder.relative_to(root).as_posix()
    base = root.resolve().name if relative == "." else relative
    return f"{base} ({name})" if name else base


def _describe(name: str, files: list[pathlib.Path]) -> Component:
    if files[0].suffix == ".gguf":
        return _foreign(name, gguf_contents(files[0]))
    if files[0].name in STATE_DICTS:
        contents = state_dict_contents(files[0].parent)
        assert contents is not None
        return _foreign(name, contents)
    layout, tensors = read_headers(files)
    if layout is None:
        contents = safetensors_contents(tensors)
        if contents is not None:
            return _foreign(name, contents)
        return Component(name, tuple(_kept_rows(tensors.values())), None, _values(tensors))
    check_headers(layout, tensors, source=str(files[0].parent))
    parts = {f"{layer}.{part}" for layer, spec in layout.layers.items() for part in spec.file_tensors()}
    kept = [tensor for tensor_name, tensor in tensors.items() if tensor_name not in parts]
    rows = [*_packed_rows(layout, tensors), *_kept_rows(kept)]
    return Component(name, tuple(rows), layout.format_version)


def _packed_rows(layout: FileLayout, tensors: Mapping[str, StoredTensor]) -> Iterable[Row]:
    groups: dict[tuple[str, str, int, int], dict[str, LayerSpec]] = collections.defaultdict(dict)
    for layer, spec in layout.layers.items():
        groups[_pattern(layer), _kind(spec), spec.out_features, spec.in_features][layer] = spec
    for (pattern, kind, rows, columns), specs in groups.items():
        size = sum(tensors[f"{layer}.{part}"].bytes for layer, spec in specs.items() for part in spec.file_tensors())
        yield Row(pattern, kind, len(specs), (rows, columns), sum(spec.weights for spec in specs.values()), size)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _foreign(name: str, contents: ForeignContents) -> Component:
    """Quantized layers by pattern, kind and shape; all other tensors by their dtype."""
    groups: dict[tuple[str, str, tuple[int, int]], list[int]] = collections.defaultdict(list)
    kept: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for weight in contents.weights:
        if weight.quantized and len(weight.shape) == 2:
            pattern = _pattern(weight.name.removesuffix(".weight"))
            groups[pattern, weight.kind, (weight.shape[0], weight.shape[1])].append(weight.bytes)
        else:
            kept[weight.kind].append((math.prod(weight.shape), weight.bytes))
    rows = [
        Row(pattern, kind, len(sizes), shape, len(sizes) * math.prod(shape), sum(sizes))
        for (pattern, kind, shape), sizes in groups.items()
    ]
    for kind, sizes in sorted(kept.items()):
        rows.append(
            Row("(kept)", kind, len(sizes), None, sum(count for count, _ in sizes), sum(size for _, size in sizes))
        )
    return Component(name, tuple(rows), None, contents.format)


def _values(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Looks at a few rows of one tensor of each pattern."""
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, stored in tensors.items():
        seen.setdefault((_pattern(name), stored.shape), name)
    return UNPACKED if any(holds_ternary_values(tensors[name], name) for name in seen.values()) else None


def _kind(spec: LayerSpec) -> str:
    if isinstance(spec, Int8Spec):
        return "int8"
    grouping = "per row" if spec.groups == 1 else f"g{spec.group_size} {spec.scales}"
    return f"ternary {grouping}"


def _kept_rows(tensors: Iterable[StoredTensor]) -> Iterable[Row]:
    by_dtype: dict[str, list[StoredTensor]] = collections.defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for dtype, group in sorted(by_dtype.items()):
        weights = sum(math.prod(tensor.shape) for tensor in group)
        yield Row("(kept)", dtype.lower(), len(group), None, weights, sum(tensor.bytes for tensor in group))
