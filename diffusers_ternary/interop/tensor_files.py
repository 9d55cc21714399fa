# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files or in a PyTorch state dict, by name and one at a time."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..backend import StoredTensor, read_headers
from ..backend.checkpoint import load_tensor
from ..backend.float8 import find_float8_scales
from ..format.dtypes import dtype_name


_MAX_DEPTH = 16


class TensorFiles(Protocol):
    """Tensors by name; `stored` has the headers of those in files, settings left out."""

    stored: dict[str, StoredTensor]

    def names(self) -> list[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def read(self, name: str) -> Any:
        """The tensor; settings in a state dict of HQQ are other Python values."""
        ...


class SafetensorsFiles:
    """Tensors of the safetensors files of one checkpoint.

    Args:
        files (`Sequence[Path]`): all its shards.

    Raises:
        ValueError: if a file is damaged, or a packed checkpoint of this package.
    """

    def __init__(self, files: Sequence[pathlib.Path]) -> None:
        layout, self.stored = read_headers(files)
        if layout is not None:
            raise ValueError(f"{files[0].parent} is packed already. Load it with from_pretrained.")
        self.source = str(files[0].parent)
        self.float8 = find_float8_scales(self.stored, self._stored, source=self.source)

    def names(self) -> list[str]:
        """All names, file by file, but for the scales of 8-bit floats."""
        return [name for name in self.stored if name not in self.float8.extras]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        return self.stored[name].shape

    def read(self, name: str) -> torch.Tensor:
        """From the file; nothing else is read. 8-bit floats with scales in float32."""
        return self.float8.weight(name, self._stored(name))

    def _stored(self, name: str) -> torch.Tensor:
        return load_tensor(self.stored[name], name)


class StateDictFile:
    """Tensors of a file that `torch.save` wrote, mapped from disk; nested dicts are flattened with dots.

    Raises:
        ValueError: if the file is damaged or holds anything but tensors and plain values.
    """

    def __init__(self, file: pathlib.Path) -> None:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a pickle can raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file} cannot be read as a state dict ({reason}). Download it again.") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict.")
        self.values: dict[str, Any] = dict(_flatten(content, file))
        self.stored = {
            name: StoredTensor(str(file), dtype_name(value, name), tuple(value.shape))
            for name, value in self.values.items()
            if isinstance(value, torch.Tensor)
        }

    def names(self) -> list[str]:
        """All names."""
        return list(self.values)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.stored[name].shape

    def read(self, name: str) -> Any:
        """The value."""
        return self.values[name]


def _flatten(content: Mapping[str, Any], file: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Values of nested dicts by their dotted names.

    Raises:
        ValueError: if they are more than the file can hold (pickles may refer to one dict any number of times), or a
            tensor is larger than its data.
    """
    most = file.stat().st_size
    found = 0
    waiting: list[tuple[str, Mapping[str, Any], int]] = [("", content, 0)]
    while waiting:
        prefix, values, depth = waiting.pop()
        for name, value in values.items():
            found += 1
            if found > most or depth > _MAX_DEPTH:
                raise ValueError(f"{file} holds dicts nested without end. It is damaged, or was made to harm.")
            if isinstance(value, Mapping):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
            elif value is not None:
                _check_storage(f"{prefix}{name}", value, file)
                yield f"{prefix}{name}", value


def _check_storage(name: str, value: Any, file: pathlib.Path) -> None:
    if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(
            f"{file}: {name} is {list(value.shape)}, more than its {value.untyped_storage().nbytes()} bytes of data."
        )
