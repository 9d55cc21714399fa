# SPDX-License-Identifier: Apache-2.0
"""`export_mflux`: a packed denoiser in the form that mflux saves and loads, for Apple's MLX."""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from safetensors import safe_open
from safetensors.torch import save_file

from ..backend.folder import refuse_links
from ..backend.packed_folder import PackedFolder
from ..files import write_json
from ..files.destinations import output_folder
from ..format import Int8Spec, TernarySpec
from .gguf_blocks import block_scales
from .mflux_names import mflux_module
from .mlx_affine import AffineWeight, affine_group_size, encode_affine
from .packed import open_packed


# What mflux writes into its own files, and looks for when it loads.
_METADATA = {"quantization_level": "2", "mflux_version": "0.24.0"}
_INDEX = "model.safetensors.index.json"
_MAX_SHARD = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class MfluxReport:
    """What an export wrote, and what reading it again proved.

    Args:
        path (`Path`): the folder.
        architecture (`str`): class of the denoiser in diffusers.
        types (`dict[str, int]`): `"2-bit"`, `"8-bit"` and `"float"` → number of weights' tensors.
        weights (`int`): weights that were read from the files again and compared with the packed model, all of them.
        differing (`int`): of these, how many differ.
        bytes (`int`): size of the files.
    """

    path: pathlib.Path
    architecture: str
    types: dict[str, int]
    weights: int
    differing: int
    bytes: int

    def proof(self) -> str:
        """What was compared, in one line."""
        return f"{self.differing:,} of {self.weights:,} weights differ from the packed model"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export_mflux(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_size: int = _MAX_SHARD,
    overwrite: bool = False,
) -> MfluxReport:
    """Writes a packed FLUX.1, FLUX.2, Z-Image or Qwen-Image for mflux, reads it again and compares every weight.

    Ternary layers become MLX's 2-bit affine weights, int8 layers its 8-bit ones, both exact; everything else stays as
    it is. Of a pipeline, the other components are copied, so that the result is what `mflux-generate --model` takes.

    Args:
        source (`str` or `PathLike`): packed model folder, or the pipeline folder it is in.
        destination (`str` or `PathLike`): folder to write: of the pipeline, or of the denoiser alone.
        max_shard_size (`int`, *optional*, defaults to 2 GB): bytes of tensors per file.
        overwrite (`bool`, *optional*): replace the destination.

    Returns:
        [`MfluxReport`].

    Raises:
        ValueError: if the source is not a packed model that mflux runs, holds symbolic links, or a layer has a
            rotation, a low-rank correction, or groups that MLX does not know.
        FileExistsError: if the destination exists, or holds what is not a result of an earlier run.
    """
    root = pathlib.Path(source)
    refuse_links(root)  # other components are copied
    with output_folder(destination, sources=[root], overwrite=overwrite) as folder:
        model = open_packed(root)
        class_name = model.config.get("_class_name", "?")
        names = sorted(model.names())
        for name in names:
            mflux_module(class_name, _module(name))
            _check(model, name)
        part = folder if model.path == root else folder / model.path.relative_to(root)
        _copy_rest(root, folder, model.path)
        part.mkdir(parents=True, exist_ok=True)
        shards = _write(model, names, class_name, part, max_shard_size)
        write_json(part / _INDEX, {"metadata": _METADATA, "weight_map": _weight_map(shards)})
        kinds = collections.Counter(_kind(model, name) for name in names)
        weights, differing = _compare(model, names, class_name, part, shards)
        size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        if differing:
            raise RuntimeError(f"{differing} weights differ after the export. This is a bug; please report it.")
    return MfluxReport(pathlib.Path(destination), class_name, dict(kinds), weights, differing, size)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _renamed(class_name: str, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{mflux_module(class_name, module)}.{leaf}" if module else leaf


def _kind(model: PackedFolder, name: str) -> str:
    spec = model.spec(name)
    return "float" if spec is None else "8-bit" if isinstance(spec, Int8Spec) else "2-bit"


def _check(model: PackedFolder, name: str) -> None:
    spec = model.spec(name)
    if spec is None or affine_group_size(spec) is not None:
        return
    if isinstance(spec, TernarySpec) and (spec.hadamard or spec.rank):
        reason = "its inputs are rotated" if spec.hadamard else "it has a low-rank correction"
    else:
        reason = "MLX knows groups of 32, 64 and 128 input features, which do not fit into its groups"
    raise ValueError(
        f"{_module(name)} cannot be exported to mflux: {reason}. Calibrate or quantize without hadamard and rank, "
        "with a group size that is a multiple of 32."
    )


def _encode(model: PackedFolder, name: str) -> AffineWeight:
    spec = model.spec(name)
    assert spec is not None
    size = affine_group_size(spec)
    assert size is not None
    group_size = spec.group_size if isinstance(spec, TernarySpec) else spec.in_features
    scales = block_scales(model.group_scales(name), group_size, spec.in_features, size)
    return encode_affine(model.codes(name), scales.contiguous(), _bits(model, name))


def _bits(model: PackedFolder, name: str) -> int:
    return 8 if isinstance(model.spec(name), Int8Spec) else 2


def _tensors(model: PackedFolder, names: list[str], class_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in tqdm(names, desc="Exporting", leave=False):
        renamed = _renamed(class_name, name)
        if model.spec(name) is None:
            yield renamed, model.read(name)
            continue
        encoded = _encode(model, name)
        module = _module(renamed)
        # MLX reads uint32; torch's own has hardly any operations.
        yield renamed, encoded.weight.view(torch.uint32)
        yield f"{module}.scales", encoded.scales
        yield f"{module}.biases", encoded.biases


def _write(
    model: PackedFolder, names: list[str], class_name: str, folder: pathlib.Path, max_shard_size: int
) -> dict[str, list[str]]:
    """Writes shards `0.safetensors`, `1.safetensors`, ...; returns the names in each."""
    shards: dict[str, list[str]] = {}
    waiting: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"{len(shards)}.safetensors"
        save_file(waiting, folder / file, metadata=_METADATA)
        shards[file] = list(waiting)
        waiting.clear()

    for name, tensor in _tensors(model, names, class_name):
        if waiting and size + tensor.nbytes > max_shard_size:
            flush()
            size = 0
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
    flush()
    return shards


def _weight_map(shards: dict[str, list[str]]) -> dict[str, str]:
    return {name: file for file, names in shards.items() for name in names}


def _compare(
    model: PackedFolder, names: list[str], class_name: str, folder: pathlib.Path, shards: dict[str, list[str]]
) -> tuple[int, int]:
    """Weights compared and weights that differ, read from the files and unpacked by other code than packed them."""
    places = _weight_map(shards)
    weights = differing = 0
    for name in tqdm(names, desc="Comparing", leave=False):
        renamed = _renamed(class_name, name)
        exact = model.dequantize(name).numpy()
        if model.spec(name) is None:
            back = _read(folder, places, renamed).float().numpy()
        else:
            module = _module(renamed)
            parts = (_read(folder, places, part) for part in (renamed, f"{module}.scales", f"{module}.biases"))
            back = dequantize_affine(*parts, bits=_bits(model, name))
        weights += exact.size
        differing += int(np.count_nonzero(back.reshape(exact.shape) != exact))
    return weights, differing


def _read(folder: pathlib.Path, places: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(folder / places[name], framework="pt") as file:
        return file.get_tensor(name)


def dequantize_affine(weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, *, bits: int) -> np.ndarray:
    """float32 `[N, K]` of MLX's affine weights: bytes of little-endian words, `scales * q + biases` per group.

    Args:
        weight (`torch.Tensor`): uint32 `[N, K * bits / 32]`.
        scales, biases (`torch.Tensor`): `[N, K / group_size]`.
        bits (`int`): 2 or 8.
    """
    data = weight.numpy().astype("<u4").view(np.uint8)  # [N, K * bits / 8]
    groups = scales.shape[1]
    if bits == 2:
        data = np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(data), -1)
    levels = data.reshape(len(data), groups, -1).astype(np.float32)
    values = levels * scales.float().numpy()[..., None] + biases.float().numpy()[..., None]
    return values.reshape(len(data), -1)


def _copy_rest(root: pathlib.Path, folder: pathlib.Path, denoiser: pathlib.Path) -> None:
    """The other components of a pipeline, and what describes it; nothing of the packed weights."""

    def left_out(directory: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".")}
        if pathlib.Path(directory) != denoiser:
            return hidden
        return hidden | {name for name in names if ".safetensors" in name or name == "config.json"}

    shutil.copytree(root, folder, ignore=left_out, dirs_exist_ok=True)
    config = json.loads((denoiser / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_json((folder / denoiser.relative_to(root)) / "config.json", config)
