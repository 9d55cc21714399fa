# SPDX-License-Identifier: Apache-2.0
"""A packed model on disk, read without building the model: one layer or tensor at a time."""

import dataclasses
import os
import pathlib
from typing import Any

from ..files import read_json
from .checkpoint import PackedCheckpoint, check_headers, check_packed_as_declared, check_values, read_headers
from .folder import default_files, model_name, quant_method
from .method import QUANT_METHOD


@dataclasses.dataclass(frozen=True)
class PackedFolder(PackedCheckpoint):
    """A model folder with packed weights that `save_pretrained` or [`PackedFolderWriter`] wrote.

    `PackedFolder.open(path)` reads and checks config.json and the headers; tensors are read when they are asked for,
    each of them checked: [`~PackedCheckpoint.read`], [`~PackedCheckpoint.weight`], [`~PackedCheckpoint.dequantize`].

    Args:
        layout ([`FileLayout`]): packed layers and checksums.
        tensors (`dict[str, StoredTensor]`): all tensors, packed or kept.
        path (`Path`): the folder.
        config (`dict[str, Any]`): config.json without its `quantization_config`: that of the float model.
    """

    path: pathlib.Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PackedFolder":
        """Opens a folder that must be packed; no tensor data is read.

        Raises:
            ValueError: if it is not, is incomplete or damaged, or config.json and weights contradict each other.
        """
        folder = cls.find(path)
        if folder is None:
            raise ValueError(
                f"{path} is not a packed model. Make one with `diffusers-ternary quantize`, `calibrate` or `convert`."
            )
        return folder

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> "PackedFolder | None":
        """As [`~PackedFolder.open`], but `None` for a folder that holds a float model, or no model."""
        folder = pathlib.Path(path)
        config = read_json(folder / "config.json")
        if config is None:
            return None
        layout, tensors = read_headers(default_files(folder, config))
        declared = quant_method(config, source=folder) == QUANT_METHOD
        check_packed_as_declared(layout, declared=declared, source=str(folder))
        if layout is None:
            return None
        check_headers(layout, tensors, source=str(folder))
        config = {name: value for name, value in config.items() if name != "quantization_config"}
        return cls(layout, tensors, folder, config)

    @property
    def library(self) -> str:
        """`"diffusers"` or `"transformers"`."""
        return model_name(self.config)[0]

    @property
    def class_name(self) -> str:
        """Of the model."""
        return model_name(self.config)[1]

    def check_values(self) -> None:
        """Reads all tensors, one at a time, and checks their checksums and values.

        Raises:
            ValueError: names the file, the tensor and the remedy.
        """
        check_values(self.layout, self.tensors)
