# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files or in a PyTorch state dict, by name and one at a time."""

import pathlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..quantizers import read_headers
from ..quantizers.checkpoint import load_tensor
from ..quantizers.float8 import find_float8_scales


class TensorFiles(Protocol):
    """Tensors by name."""

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
        self.float8 = find_float8_scales(self.stored, self._stored, source=str(files[0].parent))

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
        except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file} cannot be read as a state dict ({reason}). Download it again.") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict.")
        self.values: dict[str, Any] = dict(_flatten(content))

    def names(self) -> list[str]:
        """All names."""
        return list(self.values)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.values[name].shape)

    def read(self, name: str) -> Any:
        """The value."""
        return self.values[name]


def _flatten(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat += [(f"{name}.{inner}", part) for inner, part in _flatten(value)]
        elif value is not None:
            flat.append((name, value))
    return flat
