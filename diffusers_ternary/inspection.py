# SPDX-License-Identifier: Apache-2.0
"""What a folder or file of weights holds, read from headers only."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .format import FileLayout, Int8Spec, LayerSpec
from .quantizers import StoredTensor, check_headers, file_bytes, read_headers


_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


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
    """

    name: str
    rows: tuple[Row, ...]
    format_version: int | None

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
            "bytes": self.bytes,
            "bytes_16bit": self.bytes_16bit,
            "packed_bits_per_weight": self.packed_bits_per_weight,
            "rows": rows,
        }


def inspect_path(path: str | pathlib.Path) -> list[Component]:
    """Describes every model below a path.

    Args:
        path (`str` or `Path`): a pipeline folder, a model folder, or a safetensors file.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there are no safetensors files, or one is damaged or incomplete.
    """
    root = pathlib.Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist. Give a folder with safetensors files, or one such file.")
    files = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ValueError(f"{root} holds no safetensors files, and other formats are not read.")
    folders: dict[tuple[pathlib.Path, str], list[pathlib.Path]] = collections.defaultdict(list)
    for file in files:
        folders[file.parent, _checkpoint_name(file)].append(file)
    several = collections.Counter(folder for folder, _ in folders)
    return [
        _describe(_component_name(root, folder, name if several[folder] > 1 else ""), shards)
        for (folder, name), shards in folders.items()
    ]


def _checkpoint_name(file: pathlib.Path) -> str:
    # The shards of one checkpoint belong together; another variant in the same folder is another checkpoint.
    return re.sub(r"-\d{5}-of-\d{5}", "", file.stem)


def _component_name(root: pathlib.Path, folder: pathlib.Path, name: str) -> str:
    if root.is_file():
        return root.name
    relative = folder.relative_to(root).as_posix()
    base = root.resolve().name if relative == "." else relative
    return f"{base} ({name})" if name else base


def _describe(name: str, files: list[pathlib.Path]) -> Component:
    layout, tensors = read_headers(files)
    if layout is None:
        return Component(name, tuple(_kept_rows(tensors.values())), None)
    check_headers(layout, tensors, source=str(files[0].parent))
    parts = {f"{layer}.{part}" for layer, spec in layout.layers.items() for part in spec.file_tensors()}
    kept = [tensor for tensor_name, tensor in tensors.items() if tensor_name not in parts]
    rows = [*_packed_rows(layout, tensors), *_kept_rows(kept)]
    return Component(name, tuple(rows), layout.format_version)


def _packed_rows(layout: FileLayout, tensors: Mapping[str, StoredTensor]) -> Iterable[Row]:
    groups: dict[tuple[str, str, int, int], list[LayerSpec]] = collections.defaultdict(list)
    for layer, spec in layout.layers.items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer)
        groups[pattern, _kind(spec), spec.out_features, spec.in_features].append(spec)
    for (pattern, kind, rows, columns), specs in groups.items():
        size = sum(file_bytes(spec) for spec in specs)
        yield Row(pattern, kind, len(specs), (rows, columns), sum(spec.weights for spec in specs), size)


def _kind(spec: LayerSpec) -> str:
    if isinstance(spec, Int8Spec):
        return "int8"
    grouping = "per row" if spec.groups == 1 else f"g{spec.group_size} {spec.scales}"
    return f"ternary {grouping}"


def _kept_rows(tensors: Iterable[StoredTensor]) -> Iterable[Row]:
    by_dtype: dict[str, list[int]] = collections.defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(math.prod(tensor.shape))
    for dtype, sizes in sorted(by_dtype.items()):
        # Unknown dtypes (8-bit floats, say) are all one byte wide today.
        width = _BITS.get(dtype, 8)
        yield Row("(kept)", dtype.lower(), len(sizes), None, sum(sizes), sum(sizes) * width // 8)
