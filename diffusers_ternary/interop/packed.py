# SPDX-License-Identifier: Apache-2.0
"""Reads packed folders without building the model: one layer or tensor at a time."""

import dataclasses
import pathlib
from typing import Any

import torch

from ..backend import StoredTensor, check_headers, read_headers
from ..backend.checkpoint import check_crc, check_tensor, load_tensor
from ..backend.folder import default_files
from ..files import read_json
from ..format import LOW_RANK_NAMES, FileLayout, LayerSpec, TernarySpec, expand_scales, group_scales, unpack_base3
from ..ternarize import rotate
from .open import pipeline_components


@dataclasses.dataclass(frozen=True)
class PackedFolder:
    """A packed model on disk.

    Args:
        path (`Path`): its folder.
        config (`dict`): config.json without its `quantization_config`.
        layout ([`FileLayout`]): packed layers.
        tensors (`dict[str, StoredTensor]`): all tensors.
    """

    path: pathlib.Path
    config: dict[str, Any]
    layout: FileLayout
    tensors: dict[str, StoredTensor]

    def names(self) -> set[str]:
        """Names of the float model's tensors."""
        parts = {f"{layer}.{part}" for layer, spec in self.layout.layers.items() for part in spec.file_tensors()}
        return (self.tensors.keys() - parts) | {f"{layer}.weight" for layer in self.layout.layers}

    def spec(self, name: str) -> LayerSpec | None:
        """What is stored for a weight of the float model; `None` if it is stored as it is."""
        return self.layout.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, its checksum and values checked."""
        stored = self.tensors[name]
        tensor = load_tensor(stored, name)
        check_crc(name, tensor, self.layout, source=stored.file)
        layer, _, part = name.rpartition(".")
        spec = self.layout.layers.get(layer)
        if spec is not None and part in spec.file_tensors():
            check_tensor(name, part, tensor, spec, source=stored.file)
        return tensor

    def group_scales(self, name: str) -> torch.Tensor:
        """Effective float32 scales of a packed weight, `[N, G]`."""
        layer = name.removesuffix(".weight")
        stored = f"{layer}.weight_multiplier"
        multiplier = self.read(stored) if stored in self.tensors else None
        return group_scales(self.read(f"{layer}.weight_scale"), multiplier)

    def codes(self, name: str) -> torch.Tensor:
        """Codes of a ternary weight, int8 `[N, K]`; the values of an int8 one."""
        spec = self.spec(name)
        assert spec is not None
        stored = self.read(name)
        if isinstance(spec, TernarySpec):
            return unpack_base3(stored, (spec.out_features, spec.in_features))
        return stored

    def product(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Codes times scales, float32 `[N, K]`."""
        spec = self.spec(name)
        size = spec.group_size if isinstance(spec, TernarySpec) else 1
        codes = self.codes(name)
        return codes * expand_scales(scales, size, codes.shape[1])

    def dequantize(self, name: str) -> torch.Tensor:
        """A weight of the float model in float32, rotation and low-rank correction included."""
        spec = self.spec(name)
        if spec is None:
            return self.read(name).float()
        dense = self.product(name, self.group_scales(name))
        if isinstance(spec, TernarySpec):
            dense = rotate(dense, spec.hadamard)
        if isinstance(spec, TernarySpec) and spec.rank:
            up, down = (self.read(f"{name.removesuffix('.weight')}.{part}").float() for part in LOW_RANK_NAMES)
            dense = dense + up @ down
        return dense


def open_packed(path: pathlib.Path) -> PackedFolder:
    """Opens a packed denoiser: its folder, or the pipeline's that it is in.

    Raises:
        ValueError: if there is none, or it is damaged.
        FileNotFoundError: if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the folder of a packed model.")
    if (path / "model_index.json").is_file():
        (name, *others) = pipeline_components(path, None)
        if others:
            raise ValueError(f"{path} has several denoisers ({name}, {', '.join(others)}). Give the folder of one.")
        path = path / name
    config = read_json(path / "config.json")
    layout, tensors = read_headers([] if config is None else default_files(path, config))
    if config is None or layout is None:
        raise ValueError(
            f"{path} is not a packed model. Make one with `diffusers-ternary quantize`, `calibrate` or `convert`."
        )
    check_headers(layout, tensors, source=str(path))
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    return PackedFolder(path, config, layout, tensors)
