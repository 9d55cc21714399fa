# SPDX-License-Identifier: Apache-2.0
"""What a packed safetensors file says of itself, in the metadata of its header."""

import dataclasses
import json
import zlib
from collections.abc import Mapping

import torch

from .spec import LayerSpec, layer_spec_from_json


FORMAT_VERSION = 1
METADATA_KEY = "diffusers_ternary"
_REWRITE = "Download the file again, or write it again with diffusers-ternary."


def crc32(tensor: torch.Tensor) -> int:
    """CRC-32 (zlib) of a tensor's bytes in row-major order."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data)


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The quantized layers of a checkpoint and the checksums of its tensors.

    Every shard of a checkpoint carries the whole of it.

    Args:
        layers (`dict[str, LayerSpec]`): module name → what is stored for it.
        checksums (`dict[str, int]`): tensor name → CRC-32 of its bytes.
        format_version (`int`): version of the file format.
    """

    layers: dict[str, LayerSpec]
    checksums: dict[str, int]
    format_version: int = FORMAT_VERSION

    def to_metadata(self) -> dict[str, str]:
        """Safetensors metadata (values are strings, as the format asks)."""
        body = {
            "format_version": self.format_version,
            "layers": {name: spec.to_json() for name, spec in self.layers.items()},
            "crc32": self.checksums,
        }
        return {METADATA_KEY: json.dumps(body, separators=(",", ":"))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, *, source: str) -> "FileLayout | None":
        """Reads the metadata of a safetensors header.

        Args:
            metadata (`Mapping[str, str]`, *optional*): the header's `__metadata__`.
            source (`str`): file name for messages.

        Returns:
            `FileLayout`, or `None` if the file holds no quantized layers of this package.

        Raises:
            ValueError: if the metadata is malformed, or of a newer format version.
        """
        if not metadata or METADATA_KEY not in metadata:
            return None
        try:
            body = json.loads(metadata[METADATA_KEY])
            version = body["format_version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{source}: the {METADATA_KEY} metadata cannot be read ({error}). {_REWRITE}") from error
        check_format_version(version, source=source)
        try:
            layers = {name: layer_spec_from_json(spec) for name, spec in body["layers"].items()}
            checksums = {name: int(value) for name, value in body["crc32"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: the {METADATA_KEY} metadata is malformed ({error}). {_REWRITE}") from error
        return cls(layers=layers, checksums=checksums, format_version=version)


def check_format_version(version: object, *, source: str) -> None:
    """Raises unless this package reads format `version`.

    Raises:
        ValueError: names `source`, the version and what to do.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{source}: format_version={version!r} is not a positive integer. {_REWRITE}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{source}: format_version={version} is newer than {FORMAT_VERSION}, the newest that this "
            "diffusers-ternary reads. Upgrade it: pip install -U diffusers-ternary"
        )
