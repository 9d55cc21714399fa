# SPDX-License-Identifier: Apache-2.0
"""Reads 2-bit ternary state dicts of gemlite and HQQ, as Bonsai Image and others publish them.

Both store unsigned 2-bit levels, scales and zero points, and keep the module names of diffusers.

gemlite (`NAME.W_q`, `.scales`, `.zeros`, `.metadata`, `.orig_shape`): W_q is [K / e, N] with e levels along K per
integer, the first one in the lowest bits; scales and zeros are [G, N]. `metadata` is a list of integers whose mode
says what the zero point means: level - zero, or a product that is added.

HQQ (`NAME.W_q`, `.scale`, `.zero`, `.shape`, ...): the weight is reshaped to rows of one group each (axis 1) or
columns (axis 0); a byte holds the same place of the four quarters of the rows, the first quarter in the highest bits.
In safetensors files the settings are encoded as tensors; in `qmodel.pt` they are Python values in nested dicts.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .foreign_model import ForeignModel, Item
from .tensor_files import TensorFiles


FILES = ("state_dict.pt", "qmodel.pt")
# Meaning of gemlite's `W_group_mode` for the weight: (subtract zeros, multiply by scales, add zeros).
_MODES = {
    0: (False, False, False),
    1: (True, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (False, True, True),
}
# Positions in gemlite's `metadata`.
_BITS, _LEVELS_PER_INTEGER, _CHANNEL_MODE, _GROUP_MODE = 1, 4, 9, 10


def is_two_bit(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of a gemlite or HQQ state dict."""
    return any(name.endswith(".W_q") for name in names)


def read_two_bit(files: TensorFiles, config: dict[str, Any], *, weights_name: str) -> ForeignModel:
    """Describes a gemlite or HQQ state dict.

    Args:
        files ([`TensorFiles`]): its tensors.
        config (`dict`): config.json of the model.
        weights_name (`str`): file name without its ending for the converted model.

    Raises:
        ValueError: if a layer lacks a tensor, or is not 2-bit.
    """
    layers, plain = _layers(files)
    shapes = {name: files.shape(name) for name in plain}
    shapes |= {f"{layer}.weight": _layer_shape(layer, parts, files) for layer, parts in layers.items()}

    def items() -> Iterator[Item]:
        for layer, parts in layers.items():
            yield f"{layer}.weight", _decode(layer, {part: files.read(name) for part, name in parts.items()})
        for name in plain:
            yield name, files.read(name)

    return ForeignModel(two_bit_kind(files), config, shapes, items, weights_name)


def two_bit_kind(files: TensorFiles) -> str:
    """The format, for people."""
    return "gemlite 2-bit" if any(name.endswith(".metadata") for name in files.names()) else "HQQ"


def two_bit_shapes(files: TensorFiles) -> dict[str, tuple[int, ...]]:
    """Shapes of the 2-bit layers' weights."""
    layers, _ = _layers(files)
    return {layer: _layer_shape(layer, parts, files) for layer, parts in layers.items()}


def two_bit_owner(name: str, layers: Mapping[str, Any]) -> tuple[str | None, str]:
    """The 2-bit layer that a tensor or setting belongs to, and its name there (HQQ nests some settings)."""
    layer = name
    while layer:
        layer = layer.rpartition(".")[0]
        if layer in layers:
            return layer, name[len(layer) + 1 :]
    return None, name


def _layers(files: TensorFiles) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Each 2-bit layer's parts (part → full name), and the names of all other tensors."""
    layers: dict[str, dict[str, str]] = {
        name.removesuffix(".W_q"): {} for name in files.names() if name.endswith(".W_q")
    }
    plain = []
    for name in files.names():
        layer, part = two_bit_owner(name, layers)
        if layer is None or part == "bias":
            plain.append(name)
        else:
            layers[layer][part] = name
    return layers, plain


def _layer_shape(layer: str, names: Mapping[str, str], files: TensorFiles) -> tuple[int, ...]:
    key = "orig_shape" if "orig_shape" in names else "shape"
    if key not in names:
        raise ValueError(
            f"{layer} has a 2-bit weight but neither orig_shape (gemlite) nor shape (HQQ). Write the state dict with "
            "a current version of gemlite or hqq."
        )
    return tuple(int(size) for size in torch.as_tensor(files.read(names[key])).tolist())


def _decode(layer: str, tensors: Mapping[str, Any]) -> torch.Tensor:
    return _decode_gemlite(layer, tensors) if "metadata" in tensors else _decode_hqq(layer, tensors)


def _decode_gemlite(layer: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    missing = [part for part in ("W_q", "scales", "zeros", "orig_shape") if part not in tensors]
    if missing:
        raise ValueError(f"{layer} lacks {', '.join(missing)}. The file is incomplete: download it again.")
    metadata = [int(value) for value in tensors["metadata"].tolist()]
    rows, columns = (int(size) for size in tensors["orig_shape"].tolist())
    if len(metadata) <= _GROUP_MODE or metadata[_BITS] != 2 or metadata[_GROUP_MODE] not in _MODES:
        raise ValueError(
            f"{layer}: gemlite metadata {metadata} is not a 2-bit weight. Only 2-bit (ternary) state dicts are read."
        )
    packed, per_integer = tensors["W_q"], metadata[_LEVELS_PER_INTEGER]
    if per_integer not in (4, 8, 16, 32):  # 2-bit levels in 8 to 64 bits
        raise ValueError(f"{layer}: gemlite metadata {metadata} says {per_integer} levels per integer.")
    if tuple(packed.shape) != (columns // per_integer, rows):
        raise ValueError(
            f"{layer}: W_q is {list(packed.shape)}, but {[rows, columns]} with {per_integer} levels per integer needs "
            f"{[columns // per_integer, rows]}. The file is damaged."
        )
    shifts = 2 * torch.arange(per_integer).to(packed.dtype)
    levels = (packed[:, None] >> shifts[None, :, None]) & 3  # [K / e, e, N]
    return _Affine.of_gemlite(tensors, metadata).apply(levels.reshape(columns, rows).T.float())


@dataclasses.dataclass(frozen=True)
class _Affine:
    """levels -> weight: (levels - subtract) * scale + add, each `[N, G]`, `[N, 1]` or a single value."""

    subtract: torch.Tensor
    scale: torch.Tensor
    add: torch.Tensor

    @classmethod
    def of_gemlite(cls, tensors: Mapping[str, torch.Tensor], metadata: list[int]) -> "_Affine":
        subtracts, multiplies, adds = _MODES[metadata[_GROUP_MODE]]
        # A scale per row multiplies the output instead of the weight, which is the same product.
        multiplies = multiplies or metadata[_CHANNEL_MODE] in (1, 3)
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        zeros = tensors["zeros"].float()
        zeros = zeros.T if zeros.dim() == 2 else zeros.reshape(1, 1)
        if zeros.numel() == 0:
            zeros = zero
        scales = tensors["scales"].float().reshape(tensors["scales"].shape[0], -1).T if multiplies else one
        return cls(zeros if subtracts else zero, scales, zeros if adds else zero)

    def apply(self, levels: torch.Tensor) -> torch.Tensor:
        """Dense float32 weight `[N, K]`."""
        columns = levels.shape[1]

        def spread(values: torch.Tensor) -> torch.Tensor:
            groups = values.shape[1]
            return values if groups == 1 else values.repeat_interleave(columns // groups, dim=1)

        return (levels - spread(self.subtract)) * spread(self.scale) + spread(self.add)


def _decode_hqq(layer: str, tensors: Mapping[str, Any]) -> torch.Tensor:
    missing = [part for part in ("W_q", "scale", "zero", "shape", "axis", "packing") if part not in tensors]
    if missing:
        raise ValueError(f"{layer} lacks {', '.join(missing)}. Quantized scales and zeros of HQQ are not read.")
    packing = _text(tensors["packing"])
    if packing != "2bit_u8":
        raise ValueError(f"{layer}: HQQ packing {packing!r} is not 2-bit. Only 2-bit (ternary) layers are read.")
    packed = tensors["W_q"]
    packed = packed.view(torch.uint8) if packed.dtype != torch.uint8 else packed
    quarters = [(packed >> shift) & 3 for shift in (6, 4, 2, 0)]
    levels = torch.cat(quarters).float()  # one group per row (axis 1) or column (axis 0)
    shape = tuple(int(size) for size in torch.as_tensor(tensors["shape"]).tolist())
    dense = (levels - torch.as_tensor(tensors["zero"]).float()) * torch.as_tensor(tensors["scale"]).float()
    if dense.numel() != shape[0] * shape[1]:
        raise ValueError(f"{layer}: W_q holds {dense.numel()} weights, but its shape is {list(shape)}.")
    return dense.reshape(shape)


def _text(value: Any) -> str:
    """A string that safetensors files hold as character codes."""
    return value if isinstance(value, str) else "".join(chr(code) for code in torch.as_tensor(value).tolist())


def find_state_dict(folder: pathlib.Path) -> pathlib.Path | None:
    """The pickled state dict in a folder of gemlite or HQQ, if there is one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)
