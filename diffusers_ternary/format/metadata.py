# SPDX-License-Identifier: Apache-2.0
"""What a packed safetensors file says of itself, in the metadata of its header."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .dtypes import dtype_name
from .spec import LayerSpec, layer_spec_from_json


FORMAT_VERSION = 3  # the newest that is read
WRITTEN_VERSION = 2  # what is written, unless a layer needs a newer one
METADATA_KEY = "diffusers_ternary"
REWRITE = "Download the file again, or write it again with diffusers-ternary."
_FIELDS = {1: {"format_version", "layers", "crc32"}}
_FIELDS[3] = _FIELDS[2] = _FIELDS[1] | {"tensors", "layout_crc32"}


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says of a tensor: dtype in its notation (`"F16"`) and shape."""

    dtype: str
    shape: tuple[int, ...]


def crc32(tensor: torch.Tensor) -> int:
    """CRC-32 (zlib) of a tensor's bytes in row-major order."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data)


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The quantized layers of a checkpoint, and what its tensors are: dtypes, shapes and checksums.

    Every shard of a checkpoint carries the whole of it.

    Args:
        layers (`dict[str, LayerSpec]`): module name → what is stored for it.
        checksums (`dict[str, int]`): tensor name → CRC-32 of its bytes, for every tensor of the checkpoint.
        headers (`dict[str, TensorHeader]`, *optional*): tensor name → dtype and shape, of the same tensors; `None` in
            files of format version 1, which do not say.
    """

    layers: dict[str, LayerSpec]
    checksums: dict[str, int]
    headers: dict[str, TensorHeader] | None = None

    @classmethod
    def of_tensors(cls, layers: Mapping[str, LayerSpec], tensors: Mapping[str, torch.Tensor]) -> "FileLayout":
        """The layout of a checkpoint that holds these tensors, as they are stored.

        Raises:
            ValueError: for a tensor without data (on the meta device), or of a dtype that files cannot hold.
        """
        missing = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
        if missing is not None:
            raise ValueError(
                f"Cannot save: {missing} is not in memory (it is offloaded, or was never loaded). Load the model "
                "without offloading, or remove the hooks, before saving it."
            )
        return cls(
            dict(layers),
            {name: crc32(tensor) for name, tensor in tensors.items()},
            {name: TensorHeader(dtype_name(tensor, name), tuple(tensor.shape)) for name, tensor in tensors.items()},
        )

    @property
    def format_version(self) -> int:
        """Version of the file format that holds what is known here."""
        if self.headers is None:
            return 1
        return max([WRITTEN_VERSION, *(spec.format_version for spec in self.layers.values())])

    def to_metadata(self) -> dict[str, str]:
        """Safetensors metadata (values are strings, as the format asks)."""
        body: dict[str, Any] = {
            "format_version": self.format_version,
            "layers": {name: spec.to_json() for name, spec in self.layers.items()},
            "crc32": self.checksums,
        }
        if self.headers is not None:
            body["tensors"] = self.headers
            body["layout_crc32"] = _layout_crc32(body["layers"], self.headers)
        return {METADATA_KEY: json.dumps(body, separators=(",", ":"))}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], *, source: str) -> "FileLayout":
        """Reads the JSON object in the metadata of a safetensors header, the value of `METADATA_KEY`.

        Args:
            body (`Mapping[str, Any]`): what [`FileLayout.to_metadata`] wrote, parsed.
            source (`str`): file name for messages.

        Raises:
            ValueError: if it is malformed, was changed since it was written, or is of a newer format version.
        """
        where = f"{source}: the {METADATA_KEY} metadata"
        if "format_version" not in body:
            raise ValueError(f"{where} cannot be read (no format_version). {REWRITE}")
        version = body["format_version"]
        check_format_version(version, source=source)
        try:
            layout = cls._from_body(body, version)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is malformed ({error}). {REWRITE}") from error
        if version > 1 and body["layout_crc32"] != _layout_crc32(body["layers"], body["tensors"]):
            raise ValueError(
                f"{where} does not match its checksum: what it says of the layers, or of the dtypes and shapes of "
                f"tensors, was changed since it was written. {REWRITE}"
            )
        return layout

    @classmethod
    def _from_body(cls, body: Mapping[str, Any], version: int) -> "FileLayout":
        if body.keys() != _FIELDS[version]:
            wrong = ", ".join(sorted(body.keys() ^ _FIELDS[version]))
            raise ValueError(f"version {version} has the fields {', '.join(sorted(_FIELDS[version]))}; wrong: {wrong}")
        layers = {name: _read_spec(name, spec) for name, spec in body["layers"].items()}
        newer = next((name for name, spec in layers.items() if spec.format_version > version), None)
        if newer is not None:
            raise ValueError(f"version {version} has no layers like {newer}: {layers[newer].to_json()}")
        checksums = {name: _checked_crc32(name, value) for name, value in body["crc32"].items()}
        if version == 1:
            return cls(layers, checksums)
        headers = {name: _read_header(name, value) for name, value in body["tensors"].items()}
        return cls(layers, checksums, headers)


def _layout_crc32(layers: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    """CRC-32 of what a layout says of layers and tensors, as JSON with sorted keys."""
    text = json.dumps({"layers": layers, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


def _read_spec(name: str, value: Any) -> LayerSpec:
    try:
        return layer_spec_from_json(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_header(name: str, value: Any) -> TensorHeader:
    dtype, shape = value
    if not isinstance(dtype, str) or not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ValueError(f"{name}: {value!r} is not a dtype and a shape")
    return TensorHeader(dtype, tuple(shape))


def _checked_crc32(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise ValueError(f"{name}: {value!r} is not a CRC-32")
    return value


def check_format_version(version: object, *, source: str) -> None:
    """Raises unless this package reads format `version`.

    Raises:
        ValueError: names `source`, the version and what to do.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{source}: format_version={version!r} is not a positive integer. {REWRITE}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{source}: format_version={version} is newer than {FORMAT_VERSION}, the newest that this "
            "diffusers-ternary reads. Upgrade it: pip install -U diffusers-ternary"
        )
