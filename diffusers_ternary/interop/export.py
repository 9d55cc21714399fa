# SPDX-License-Identifier: Apache-2.0
"""The frame of every export: a packed denoiser is checked, written beside its place, read again, compared, moved."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from ..backend.config import TernaryConfig
from ..backend.packed_folder import PackedFolder
from ..backend.sources import selected_components
from ..files import read_json
from ..format import LayerSpec, TernarySpec
from ..progress import Bar
from .slices import row_slices


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what reading it again proved.

    Args:
        path (`Path`): the file or folder.
        architecture (`str`): as the format names it: `"flux"` in GGUF, the class of diffusers for mflux.
        types (`dict[str, int]`): type in the format → number of tensors.
        inexact (`list[str]`): tensors that are not bit-equal to the packed ones: their scales were rounded, or the
            caller allowed a fallback.
        weights (`int`): weights that were read from the file again and compared with the packed model, all of them.
        differing (`int`): of these, how many differ.
        largest_difference (`float`): of these, the largest relative to the largest weight of its tensor.
        bytes (`int`): size of the weight files.
    """

    path: pathlib.Path
    architecture: str
    types: dict[str, int]
    inexact: list[str]
    weights: int
    differing: int
    largest_difference: float
    bytes: int

    def proof(self) -> str:
        """What was compared, in one line."""
        text = f"{self.differing:,} of {self.weights:,} weights differ from the packed model"
        if not self.differing:
            return text
        return f"{text}, by at most {100 * self.largest_difference:.3f} % of the largest of their tensor"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class ReadBack:
    """A tensor of the written file, and what it has to be.

    Args:
        name (`str`): in the file.
        exact (`np.ndarray`): float32 weights of the packed model.
        read (`Callable[[slice], np.ndarray]`): float32 weights of the file by slices of the first axis, unpacked by
            code that shares nothing with the packing.
    """

    name: str
    exact: np.ndarray
    read: Callable[[slice], np.ndarray]

    def compare(self) -> tuple[int, float]:
        """How many weights differ, and by how much at most, relative to the largest one."""
        differing, largest = 0, 0.0
        for rows in row_slices(self.exact.shape):
            exact = self.exact[rows]
            stored = self.read(rows).reshape(exact.shape)
            if not np.array_equal(stored, exact):
                difference = np.abs(stored - exact)
                differing += int(np.count_nonzero(difference))
                largest = max(largest, float(difference.max()))
        return differing, largest / float(np.abs(self.exact).max()) if differing else 0.0


class ExportFormat(Protocol):
    """Another program's form of a packed denoiser."""

    @property
    def may_round(self) -> bool:
        """Whether the caller allows weights that differ from the packed ones."""
        ...

    def output(
        self, destination: pathlib.Path, source: pathlib.Path, *, overwrite: bool
    ) -> contextlib.AbstractContextManager[pathlib.Path]:
        """The place to write to, which becomes `destination` when the block ends without an error."""
        ...

    def architecture(self, model: PackedFolder) -> str:
        """Name of the model's architecture in the format."""
        ...

    def check(self, model: PackedFolder) -> None:
        """The cheap checks of every layer, before the first byte is written.

        Raises:
            ValueError: if the model has no such form; names the layer and the remedy.
        """
        ...

    def write(self, model: PackedFolder, place: pathlib.Path) -> dict[str, int]:
        """Writes the model; returns how many tensors are of which type."""
        ...

    def read_back(self, model: PackedFolder, place: pathlib.Path) -> Iterator[ReadBack]:
        """All tensors of what was written."""
        ...

    def files(self, model: PackedFolder, place: pathlib.Path) -> list[pathlib.Path]:
        """The weight files."""
        ...


def export(
    form: ExportFormat,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    overwrite: bool,
) -> ExportReport:
    """Writes a packed denoiser in another program's form, reads it again and compares every weight.

    Args:
        form ([`ExportFormat`]): the form.
        source (`str` or `PathLike`): packed model folder, or the pipeline folder it is in.
        destination (`str` or `PathLike`): file or folder to write.
        overwrite (`bool`): replace the destination.

    Raises:
        ValueError: if the source is not packed, or has no such form.
        FileExistsError: if the destination exists, or is not a result of an earlier run.
        RuntimeError: if weights differ that may not, which would be a bug; nothing is left behind.
    """
    path = pathlib.Path(destination)
    with form.output(path, pathlib.Path(source), overwrite=overwrite) as place:
        model = open_packed(pathlib.Path(source))
        form.check(model)
        types = form.write(model, place)
        inexact, weights, differing, largest = [], 0, 0, 0.0
        for tensor in Bar(form.read_back(model, place), "Comparing"):
            weights += tensor.exact.size
            different, most = tensor.compare()
            if different:
                inexact.append(tensor.name)
                differing += different
                largest = max(largest, most)
        if differing and not form.may_round:
            raise RuntimeError(f"{differing} weights differ after the export. This is a bug; please report it.")
        size = sum(file.stat().st_size for file in form.files(model, place))
        return ExportReport(path, form.architecture(model), types, inexact, weights, differing, largest, size)


def open_packed(path: pathlib.Path) -> PackedFolder:
    """Opens a packed denoiser: its folder, or the pipeline's that it is in.

    Raises:
        ValueError: if there is none, or it is damaged.
        FileNotFoundError: if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the folder of a packed model.")
    index = read_json(path / "model_index.json")
    if index is not None:
        (name, *others) = selected_components(index, TernaryConfig(), source=path)
        if others:
            raise ValueError(f"{path} has several denoisers ({name}, {', '.join(others)}). Give the folder of one.")
        path = path / name
    return PackedFolder.open(path)


MERGE = "store such layers unpacked in 16 bits (--merge)"
"""What helps in any case."""
ONLY_CODES = f"Calibrate or quantize without hadamard, column_scales and rank, or {MERGE}."
"""What helps against [`more_than_codes`]."""


def more_than_codes(spec: LayerSpec) -> str:
    """Why codes and scales alone are not the weight, which is all that other formats store; empty if they are."""
    if isinstance(spec, TernarySpec) and spec.hadamard:
        return "its inputs are rotated"
    if isinstance(spec, TernarySpec) and spec.column_scales:
        return "its inputs are scaled one by one"
    return "it has a low-rank correction" if isinstance(spec, TernarySpec) and spec.rank else ""


def four_in_a_byte(codes: torch.Tensor) -> torch.Tensor:
    """Ternary codes as two bits each, code + 1, the first of four in the lowest bits.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`, contiguous, K divisible by four.

    Returns:
        `torch.Tensor`: uint8 `[N, K / 4]`.
    """
    words = (codes + 1).view(torch.int32)  # little-endian: the first code is in the lowest byte
    return (words | words >> 6 | words >> 12 | words >> 18).to(torch.uint8)


def block_scales(spec: LayerSpec, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Scales of a layer's groups, repeated for blocks that lie inside them.

    Args:
        spec ([`LayerSpec`]): of the layer.
        scales (`torch.Tensor`): `[N, G]`.
        block (`int`): input features of a block.

    Returns:
        `torch.Tensor`: `[N, K / block]`.
    """
    blocks = spec.in_features // block
    if scales.shape[1] == 1 or not isinstance(spec, TernarySpec):
        return scales.expand(-1, blocks)
    return scales.repeat_interleave(spec.group_size // block, dim=1)[:, :blocks]
