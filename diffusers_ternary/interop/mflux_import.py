# SPDX-License-Identifier: Apache-2.0
"""Reads denoisers that mflux or `export_mflux` saved; ternary layers are recovered exactly.

It shares nothing with the packing (`mlx_affine.py`), so that reading back proves what was written.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..backend import read_headers
from ..backend.checkpoint import load_tensor
from ..backend.folder import shard_names
from ..files import read_json
from .empty_model import empty_model
from .foreign_model import ForeignModel, Item
from .mflux_names import mflux_name
from .slices import row_slices


INDEX = "model.safetensors.index.json"


class MfluxFiles:
    """The tensors of a folder that mflux saved, by mflux's names.

    Raises:
        ValueError: if the folder is incomplete or damaged.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        files = [folder / file for file in shard_names(read_json(folder / INDEX) or {}, source=folder / INDEX)]
        _, self.stored = read_headers(files)

    def read(self, name: str, *, columns: int) -> torch.Tensor:
        """A tensor as it is stored; an affine weight as float32 `[N, columns]`."""
        module = name.removesuffix(".weight")
        if name == module or f"{module}.scales" not in self.stored:
            return load_tensor(self.stored[name], name)
        names = (name, f"{module}.scales", f"{module}.biases")
        weight, scales, biases = (load_tensor(self.stored[part], part) for part in names)
        return torch.from_numpy(dequantize_affine(weight, scales, biases, bits=weight.shape[1] * 32 // columns))


def is_mflux(folder: pathlib.Path) -> bool:
    """Whether a folder holds weights that mflux or `export_mflux` saved."""
    metadata = (read_json(folder / INDEX) or {}).get("metadata")
    return isinstance(metadata, dict) and "mflux_version" in metadata


def read_mflux(folder: pathlib.Path, config: dict[str, Any]) -> ForeignModel:
    """Describes a denoiser in the form of mflux.

    Args:
        folder (`Path`): of the denoiser.
        config (`dict`): its config.json.

    Raises:
        ValueError: if mflux does not run the class, or a tensor is missing or damaged.
    """
    files = MfluxFiles(folder)
    stored = {name: tensor.shape for name, tensor in files.stored.items()}
    model = empty_model(config, stored, source=folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {name: mflux_name(type(model).__name__, name) for name in shapes}
    missing = sorted(set(names.values()) - stored.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of mflux ({missing[0]}). Download it again.")

    def items() -> Iterator[Item]:
        for name, shape in shapes.items():
            yield name, files.read(names[name], columns=shape[-1] if shape else 1).reshape(shape)

    return ForeignModel("mflux", config, shapes, items)


# The four levels of a byte, that in the lowest bits first.
_LEVELS = ((np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3).astype(np.float32)


def dequantize_affine(weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, *, bits: int) -> np.ndarray:
    """float32 `[N, K]` of MLX's affine weights: bytes of little-endian words, `scales * q + biases` per group.

    Args:
        weight (`torch.Tensor`): uint32 `[N, K * bits / 32]`.
        scales, biases (`torch.Tensor`): `[N, K / group_size]`.
        bits (`int`): 2 or 8.
    """
    data = weight.numpy().astype("<u4").view(np.uint8)  # [N, K * bits / 8]
    groups = scales.shape[1]
    values = np.empty((len(data), groups, data.shape[1] * 8 // bits // groups), dtype=np.float32)
    factors, offsets = scales.float().numpy()[..., None], biases.float().numpy()[..., None]
    for rows in row_slices(values.shape):
        part = values[rows]
        levels = np.take(_LEVELS, data[rows], axis=0) if bits == 2 else data[rows]  # four of a byte, the lowest first
        np.multiply(levels.reshape(part.shape), factors[rows], out=part)
        part += offsets[rows]
    return values.reshape(len(data), -1)
