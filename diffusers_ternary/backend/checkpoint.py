# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints: reads headers, checks tensors, and turns them into what layers hold in memory, and back."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open

from ..files import parse_json_object
from ..format import (
    DTYPES,
    FLOAT_NAMES,
    LOW_RANK_NAMES,
    METADATA_KEY,
    MULTIPLIER_MAX,
    REWRITE,
    FileLayout,
    Int8Spec,
    LayerSpec,
    TernarySpec,
    check_base3,
    crc32,
    group_scales,
    stored_bytes,
    unpack_base3,
)
from ..kernels.cpu.base3 import base3_to_planes, planes_to_base3
from ..layers.base import bits_to_scale, scale_to_bits
from ..progress import Bar
from ..ternarize import Int8Weight, TernaryWeight


_DAMAGED = "The file is damaged or incomplete: download it again, or write it again with diffusers-ternary."
# What transformers stores once although two modules share it.
_TIED = re.compile(r"(.*\.)?(shared|\w*embed\w*|wte|lm_head|decoder)\.weight")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says: dtype in safetensors' notation and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return stored_bytes(self.dtype, self.shape)


@dataclasses.dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint as its headers describe it.

    Args:
        layout ([`FileLayout`]): quantized layers and checksums.
        tensors (`dict[str, StoredTensor]`): every tensor of all shards.
    """

    layout: FileLayout
    tensors: dict[str, StoredTensor]

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each layer's scale as stored."""
        names = {name: self.tensors.get(f"{name}.weight_scale") for name in self.layout.layers}
        return {
            name: DTYPES.get(stored.dtype, torch.float16) if stored else torch.float16
            for name, stored in names.items()
        }

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages; a host may have renamed the tensor."""
        return self.tensors[name].file if name in self.tensors else "the checkpoint"

    def to_memory(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as the model holds it: checked and converted if it is part of a packed layer."""
        part = owner(name, self.layout.layers)
        if part is None:
            return tensor
        return to_memory(name, part[1], tensor, self.layout.layers[part[0]], source=self.file_of(name))

    def names(self) -> set[str]:
        """Names of the float model's tensors."""
        parts = {f"{layer}.{part}" for layer, spec in self.layout.layers.items() for part in spec.file_tensors()}
        return (self.tensors.keys() - parts) | {f"{layer}.weight" for layer in self.layout.layers}

    def spec(self, name: str) -> LayerSpec | None:
        """What is stored for a tensor of the float model; `None` if it is stored as it is."""
        return self.layout.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, its checksum and values checked.

        Raises:
            ValueError: if it is damaged; names the file.
        """
        stored = self.tensors[name]
        tensor = load_tensor(stored, name)
        _check(name, tensor, self.layout, source=stored.file)
        return tensor

    def weight(self, layer: str) -> TernaryWeight | Int8Weight:
        """The weight of a packed layer, its tensors read and checked ([`~PackedCheckpoint.read`])."""
        spec = self.layout.layers[layer]
        stored = {part: self.read(f"{layer}.{part}") for part in spec.file_tensors()}
        if isinstance(spec, Int8Spec):
            return Int8Weight(spec, stored["weight"], stored["weight_scale"])
        stored["weight"] = base3_to_planes(stored["weight"], spec.out_features, spec.in_features)
        return TernaryWeight.of_tensors(spec, stored)

    def codes(self, name: str) -> torch.Tensor:
        """Codes of a ternary weight of the float model, int8 `[N, K]`; the values of an int8 one."""
        spec = self.spec(name)
        stored = self.read(name)
        if isinstance(spec, TernarySpec):
            return unpack_base3(stored, (spec.out_features, spec.in_features))
        return stored

    def group_scales(self, name: str) -> torch.Tensor:
        """Effective float32 scales of a packed weight of the float model, `[N, G]`."""
        layer = name.removesuffix(".weight")
        stored = f"{layer}.weight_multiplier"
        multiplier = self.read(stored) if stored in self.tensors else None
        return group_scales(self.read(f"{layer}.weight_scale"), multiplier)

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of the float model in `dtype`; a packed weight `[N, K]`, rotation and correction included."""
        if self.spec(name) is None:
            return self.read(name).to(dtype)
        return self.weight(name.removesuffix(".weight")).dequantize(dtype)


def read_headers(
    files: Sequence[str | os.PathLike[str]],
) -> tuple[FileLayout | None, dict[str, StoredTensor]]:
    """Reads the headers of one checkpoint's safetensors files; no tensor data is touched. Other files are skipped.

    Raises:
        ValueError: if a file cannot be read, its metadata is malformed or of a newer version, two files hold the same
            tensor, or some are of another checkpoint.
    """
    layouts: dict[str, FileLayout | None] = {}
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        path = os.fspath(file)
        if not path.endswith(".safetensors"):
            continue
        with explained_damage(path), safe_open(path, framework="pt") as handle:
            layouts[path] = read_layout(handle.metadata(), source=path)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in tensors:
                    raise ValueError(
                        f"{name} is in {tensors[name].file} and in {path}. Delete the file that is wrong."
                    )
                header = handle.get_slice(name)
                tensors[name] = StoredTensor(path, header.get_dtype(), tuple(header.get_shape()))
    first, *others = layouts.items() or [("", None)]
    for path, layout in others:
        if layout != first[1]:
            raise ValueError(f"{path} belongs to another checkpoint than {first[0]}, or was changed. {_DAMAGED}")
    return first[1], tensors


def check_packed_as_declared(layout: FileLayout | None, *, declared: bool, source: str) -> None:
    """Checks that the weights of a model are packed if, and only if, its config.json says so.

    Args:
        layout ([`FileLayout`], *optional*): what the headers say.
        declared (`bool`): whether config.json names this package in its `quantization_config`.
        source (`str`): the folder.

    Raises:
        ValueError: if they contradict each other.
    """
    if layout is not None and not declared:
        raise ValueError(
            f"{source} holds packed weights, but its config.json has no quantization_config. Restore the config.json "
            'that was saved with them (it has "quant_method": "diffusers_ternary").'
        )
    if layout is None and declared:
        raise ValueError(
            f"config.json in {source} declares diffusers_ternary, but the weights beside it are not packed. Restore "
            "the packed weights, or delete quantization_config from config.json to load float weights."
        )


def read_layout(metadata: Mapping[str, str] | None, *, source: str) -> FileLayout | None:
    """What the metadata of a safetensors header says of quantized layers.

    Args:
        metadata (`Mapping[str, str]`, *optional*): the header's `__metadata__`.
        source (`str`): file name for messages.

    Returns:
        [`FileLayout`], or `None` if the file holds no quantized layers of this package.

    Raises:
        ValueError: if it is not JSON; else as [`FileLayout.from_json`].
    """
    if not metadata or METADATA_KEY not in metadata:
        return None
    where = f"{source}: the {METADATA_KEY} metadata"
    try:
        body = parse_json_object(metadata[METADATA_KEY], source=where, remedy="")
    except ValueError as error:
        raise ValueError(f"{where} cannot be read ({error}). {REWRITE}") from error
    return FileLayout.from_json(body, source=source)


@contextlib.contextmanager
def explained_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the errors of the safetensors library into one that names the file.

    Raises:
        ValueError: for a file that is not there, is damaged, or is not one of safetensors.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as safetensors ({error}). {_DAMAGED}") from error


def load_tensor(stored: StoredTensor, name: str) -> torch.Tensor:
    """A tensor of a safetensors file; nothing else is read.

    Raises:
        ValueError: names the file, if it cannot be read.
    """
    with explained_damage(stored.file), safe_open(stored.file, framework="pt") as handle:
        return handle.get_tensor(name)


def check_headers(layout: FileLayout, tensors: Mapping[str, StoredTensor], *, source: str) -> None:
    """Checks that every tensor that was written is there, kept ones too, and no other, with its dtype and shape.

    Raises:
        ValueError: names the file, the tensor and the remedy.
    """
    for layer, spec in layout.layers.items():
        for suffix, expected in spec.file_tensors().items():
            name = f"{layer}.{suffix}"
            stored = tensors.get(name)
            if stored is None:
                raise ValueError(f"{source}: the tensor {name} of a packed layer is missing. {_DAMAGED}")
            dtype = DTYPES.get(stored.dtype)
            if dtype not in expected.dtypes or stored.shape != expected.shape:
                wanted = "/".join(str(dtype).removeprefix("torch.") for dtype in expected.dtypes)
                raise ValueError(
                    f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}, but a {spec.kind} layer of "
                    f"{[spec.out_features, spec.in_features]} stores {wanted} {list(expected.shape)}. {_DAMAGED}"
                )
    _check_table(layout, tensors, source=source)


def _check_table(layout: FileLayout, tensors: Mapping[str, StoredTensor], *, source: str) -> None:
    written = layout.checksums.keys() | (layout.headers or {}).keys()
    absent = sorted(name for name in written - tensors.keys() if not _stored_elsewhere(name, layout, tensors))
    if absent:
        raise ValueError(f"{source}: {_some(absent)} missing. {_DAMAGED}")
    for name, stored in tensors.items():
        header = None if layout.headers is None else layout.headers.get(name)
        if name not in layout.checksums or (header is None and layout.headers is not None):
            raise ValueError(
                f"{stored.file}: the metadata has no entry for the tensor {name} (checksum, dtype, shape). {_DAMAGED}"
            )
        if header is not None and header != (stored.dtype, stored.shape):
            raise ValueError(
                f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}, but was written as {header.dtype} "
                f"{list(header.shape)}. {_DAMAGED}"
            )


def _stored_elsewhere(name: str, layout: FileLayout, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor is stored under the name of one that it is tied to: format version 1 listed all the names."""
    if layout.headers is not None or _TIED.fullmatch(name) is None:
        return False
    same = (other for other, value in layout.checksums.items() if value == layout.checksums[name])
    return any(other in tensors and _TIED.fullmatch(other) is not None for other in same)


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the tensor {names[0]} is"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) are"


def check_values(layout: FileLayout, tensors: Mapping[str, StoredTensor]) -> None:
    """Reads all tensors, one at a time, and checks their checksums and values.

    For hosts that offer no place to raise while they load.

    Raises:
        ValueError: names the file, the tensor and the remedy.
    """
    for file in sorted({stored.file for stored in tensors.values()}):
        with explained_damage(file), safe_open(file, framework="pt") as handle:
            for name in Bar(list(handle.keys()), "Checking the weights"):
                _check(name, handle.get_tensor(name), layout, source=file)


def _check(name: str, tensor: torch.Tensor, layout: FileLayout, *, source: str) -> None:
    check_crc(name, tensor, layout, source=source)
    part = owner(name, layout.layers)
    if part is not None:
        check_tensor(name, part[1], tensor, layout.layers[part[0]], source=source)


def owner(name: str, layers: Mapping[str, LayerSpec]) -> tuple[str, str] | None:
    """Splits a tensor name into (layer, suffix) if it is part of a packed layer."""
    layer, _, suffix = name.rpartition(".")
    if layer in layers and suffix in layers[layer].file_tensors():
        return layer, suffix
    return None


def check_crc(name: str, tensor: torch.Tensor, layout: FileLayout, *, source: str) -> None:
    """Checks a tensor, packed or not, against the checksum in the metadata.

    Raises:
        ValueError: if it differs, or there is none.
    """
    if name not in layout.checksums:
        raise ValueError(f"{source}: the metadata has no checksum of the tensor {name}. {_DAMAGED}")
    if crc32(tensor) != layout.checksums[name]:
        raise ValueError(f"{source}: the checksum of {name} does not match. {_DAMAGED}")


def check_tensor(name: str, suffix: str, tensor: torch.Tensor, spec: LayerSpec, *, source: str) -> None:
    """Checks the values of one stored tensor of a packed layer.

    Args:
        name (`str`): full tensor name, for messages.
        suffix (`str`): name within the layer, e.g. `"weight_scale"`.
        tensor (`torch.Tensor`): as stored (see FORMAT.md).
        spec ([`LayerSpec`]): of the layer.
        source (`str`): file name for messages.

    Raises:
        ValueError: for code bytes of 243 or more, scales that are not finite or negative, multipliers above 63, a
            low-rank correction that is not finite.
    """
    if suffix in ("weight_scale", "column_scale"):
        values = tensor.float()
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"{source}: {name} holds NaN, Inf or negative scales. {_DAMAGED}")
    elif suffix == "weight_multiplier":
        if int(tensor.max()) > MULTIPLIER_MAX:
            raise ValueError(
                f"{source}: {name} holds {int(tensor.max())}; multipliers are 0..{MULTIPLIER_MAX}. {_DAMAGED}"
            )
    elif suffix in LOW_RANK_NAMES:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} holds NaN or Inf. {_DAMAGED}")
    elif isinstance(spec, TernarySpec):
        try:
            check_base3(tensor)
        except ValueError as error:
            raise ValueError(f"{source}: {name}: {error}") from error


def to_memory(name: str, suffix: str, tensor: torch.Tensor, spec: LayerSpec, *, source: str) -> torch.Tensor:
    """Checks one stored tensor of a packed layer ([`check_tensor`], same arguments) and turns it into what the layer's
    parameter holds.
    """
    check_tensor(name, suffix, tensor, spec, source=source)
    if suffix in FLOAT_NAMES:
        return scale_to_bits(tensor)
    if suffix == "weight" and isinstance(spec, TernarySpec):
        return base3_to_planes(tensor, spec.out_features, spec.in_features)
    return tensor


def to_file(suffix: str, tensor: torch.Tensor, spec: LayerSpec, scale_dtype: torch.dtype) -> torch.Tensor:
    """Inverse of [`to_memory`]."""
    if suffix in FLOAT_NAMES:
        return bits_to_scale(
            tensor, scale_dtype if suffix == "weight_scale" else spec.file_tensors()[suffix].dtypes[0]
        )
    if suffix == "weight" and isinstance(spec, TernarySpec):
        return planes_to_base3(tensor, spec.in_features)
    return tensor
