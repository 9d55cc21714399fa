# SPDX-License-Identifier: Apache-2.0
"""What a folder or file of weights holds, read from headers only."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .contents import StoredWeight, pattern_of, read_contents
from .open_foreign import named_errors
from .two_bit import FILES as STATE_DICTS


_PATTERNS = ("*.safetensors", "*.gguf", *STATE_DICTS)


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
    places = [root] if root.is_file() else root.rglob("*")
    files = [file for file in places if any(file.match(pattern) for pattern in _PATTERNS)]
    if not files:
        raise ValueError(f"{root} holds no safetensors or GGUF files, and other formats are not read.")
    if root.is_file():
        return [_component(root.name, files)]
    folders = sorted({file.parent for file in files})
    names = [folder.relative_to(root).as_posix() for folder in folders]
    own = root.resolve().name
    found = (inspect_folder(folder, own if name == "." else name) for folder, name in zip(folders, names, strict=True))
    return [component for components in found for component in components]


def inspect_folder(folder: pathlib.Path, name: str) -> list[Component]:
    """Describes the checkpoints in a folder, not those below it: as `NAME`, or `NAME (FILE)` if there are several.

    Raises:
        ValueError: if a file is damaged or incomplete.
    """
    checkpoints: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for file in sorted(file for pattern in _PATTERNS for file in folder.glob(pattern)):
        checkpoints[_checkpoint_name(file)].append(file)
    return [
        _component(f"{name} ({checkpoint})" if len(checkpoints) > 1 else name, files)
        for checkpoint, files in checkpoints.items()
    ]


def _checkpoint_name(file: pathlib.Path) -> str:
    # The shards of one checkpoint belong together; another variant in the same folder is another checkpoint.
    stem = re.sub(r"-\d{5}-of-\d{5}", "", file.stem)
    return stem if file.suffix == ".safetensors" else file.name  # other formats: one file each


def _component(name: str, files: list[pathlib.Path]) -> Component:
    with named_errors(files[0]):
        contents = read_contents(files)
    return Component(name, tuple(_rows(contents.weights)), contents.format_version, contents.format)


def _rows(weights: Iterable[StoredWeight]) -> Iterator[Row]:
    """Quantized layers by pattern, kind and shape; all other tensors by their dtype."""
    layers: dict[tuple[str, str, tuple[int, int]], list[StoredWeight]] = collections.defaultdict(list)
    kept: dict[str, list[StoredWeight]] = collections.defaultdict(list)
    for weight in weights:
        if weight.quantized and len(weight.shape) == 2:
            pattern = pattern_of(weight.name.removesuffix(".weight"))
            layers[pattern, weight.kind, (weight.shape[0], weight.shape[1])].append(weight)
        else:
            kept[weight.kind].append(weight)
    for (pattern, kind, shape), group in layers.items():
        yield _row(pattern, kind, shape, group)
    for kind, group in sorted(kept.items()):
        yield _row("(kept)", kind, None, group)


def _row(name: str, kind: str, shape: tuple[int, int] | None, group: list[StoredWeight]) -> Row:
    count = sum(math.prod(weight.shape) for weight in group)
    return Row(name, kind, len(group), shape, count, sum(weight.bytes for weight in group))
