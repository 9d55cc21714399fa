# SPDX-License-Identifier: Apache-2.0
"""Writes a packed model folder tensor by tensor: memory holds one tensor at a time, whatever the model's size."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

import torch

from ..format import FileLayout, LayerSpec, TensorHeader, crc32, dtype_name
from ..kernels.cpu.base3 import planes_to_base3
from ..ternarize import TernaryWeight
from .config import TernaryConfig


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the spool of its shard."""

    name: str
    dtype: torch.dtype
    start: int
    size: int


@dataclasses.dataclass
class _Shard:
    spool: pathlib.Path
    file: IO[bytes]
    tensors: list[_Stored] = dataclasses.field(default_factory=list)
    size: int = 0


class PackedFolderWriter:
    """A model folder in the making: `add_layer` and `add_tensor` in any order, then `finish`.

    The header of a safetensors file comes first and names everything that follows, and with packed models it also
    describes the whole checkpoint; so the data is spooled beside the target and the files are made at the end.

    Args:
        folder (`Path`): existing, empty folder.
        weights_name (`str`): file name without its ending, as the host library expects it.
        max_shard_size (`int`): bytes of tensors per file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: pathlib.Path, *, weights_name: str, max_shard_size: int) -> None:
        self.folder = folder
        self.weights_name = weights_name
        self.max_shard_size = max_shard_size
        self.layers: dict[str, LayerSpec] = {}
        self.layer_bytes = 0
        self.checksums: dict[str, int] = {}
        self.headers: dict[str, TensorHeader] = {}
        self._shards: list[_Shard] = []

    def add_layer(self, name: str, weight: TernaryWeight) -> None:
        """Stores the packed weight of a module."""
        self.layers[name] = weight.spec
        stored = {**weight.tensors(), "weight": planes_to_base3(weight.packed, weight.spec.in_features)}
        for suffix, tensor in stored.items():
            self.add_tensor(f"{name}.{suffix}", tensor)
            self.layer_bytes += tensor.nbytes

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Stores a tensor as it is.

        Raises:
            ValueError: if the name is taken, or safetensors does not know the dtype.
        """
        if name in self.checksums:
            raise ValueError(f"The source holds {name} twice. Delete one of them.")
        header = TensorHeader(dtype_name(tensor, name), tuple(tensor.shape))
        data = tensor.detach().cpu().contiguous()
        size = data.nbytes
        shard = self._shard_for(size)
        shard.file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        shard.tensors.append(_Stored(name, data.dtype, shard.size, size))
        shard.size += size
        self.checksums[name] = crc32(data)
        self.headers[name] = header

    def _shard_for(self, size: int) -> _Shard:
        if not self._shards or (self._shards[-1].size and self._shards[-1].size + size > self.max_shard_size):
            spool = self.folder / f".spool-{len(self._shards)}"
            self._shards.append(_Shard(spool, spool.open("wb")))
        return self._shards[-1]

    def finish(self, config: Mapping[str, Any], quantization: TernaryConfig | None) -> int:
        """Writes the safetensors files, their index if there are several, and config.json.

        Args:
            config (`Mapping`): config.json of the model.
            quantization ([`TernaryConfig`], *optional*): what it is to say of the packed layers; `None` without any.

        Returns:
            `int`: bytes of all tensors.
        """
        metadata = {"format": "pt"}
        if quantization is not None:
            metadata |= FileLayout(self.layers, self.checksums, self.headers).to_metadata()
            config = {**config, "quantization_config": quantization.to_dict()}
        total = sum(shard.size for shard in self._shards)
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            part = "" if count == 1 else f"-{number:05}-of-{count:05}"
            file = f"{self.weights_name}{part}.safetensors"
            shard.file.close()
            _write_safetensors(self.folder / file, shard, self.headers, metadata)
            shard.spool.unlink()
            weight_map.update({tensor.name: file for tensor in shard.tensors})
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(self.folder / f"{self.weights_name}.safetensors.index.json", index)
        _write_json(self.folder / "config.json", config)
        return total


def _write_safetensors(
    path: pathlib.Path, shard: _Shard, headers: Mapping[str, TensorHeader], metadata: Mapping[str, str]
) -> None:
    # Wide dtypes first, as the library's own writer does: readers map tensors in place and need them aligned.
    order = sorted(shard.tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in order:
        offsets = [position, position + tensor.size]
        header[tensor.name] = {
            "dtype": headers[tensor.name].dtype,
            "shape": list(headers[tensor.name].shape),
            "data_offsets": offsets,
        }
        position += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as target, shard.spool.open("rb") as source:
        target.write(len(encoded).to_bytes(8, "little"))
        target.write(encoded)
        for tensor in order:
            source.seek(tensor.start)
            _copy(source, target, tensor.size)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    step = 1 << 24
    for start in range(0, size, step):
        target.write(source.read(min(step, size - start)))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
