# SPDX-License-Identifier: Apache-2.0
"""Reads Clark-style packs of Sana: one safetensors file, ternary codes beside scales, under Sana's original names.

For each quantized module `NAME`: `NAME::codes2b` uint8 [N, K / 4], four codes a byte, the first in the lowest bits,
level - 1 = code; `NAME::scale` [N, G]; `NAME::shape` [N, K]; `NAME.bias`. All other tensors are ordinary, many of them
in 8-bit floats. 1x1 convolutions are stored as matrices.
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .foreign_model import ForeignModel, Item
from .sana_names import BUFFERS, CONVOLUTIONS, rename, sana_config
from .tensor_files import SafetensorsFiles


CODES, SCALE, SHAPE = "::codes2b", "::scale", "::shape"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_clark(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of a Clark-style pack."""
    return any(name.endswith(CODES) for name in names)


def clark_owner(name: str, layers: Mapping[str, Any]) -> tuple[str | None, str]:
    """The quantized layer that a tensor belongs to, and its name there."""
    layer, _, part = name.partition("::")
    return (layer, part) if part and layer in layers else (None, name)


def read_clark(file: pathlib.Path, config: dict[str, Any] | None) -> ForeignModel:
    """Describes a Clark-style pack.

    Args:
        file (`Path`): the safetensors file.
        config (`dict`, *optional*): config.json of the Sana transformer; default: what the shapes say.

    Raises:
        ValueError: if a part is missing, the codes are not codes, or it is not Sana.
    """
    files = SafetensorsFiles([file])
    names = files.names()
    modules = [name.removesuffix(CODES) for name in names if name.endswith(CODES)]
    for module in modules:
        for part in (SCALE, SHAPE):
            if f"{module}{part}" not in files.stored:
                raise ValueError(f"{file}: {module}{part} is missing. The file is incomplete: download it again.")
    plain = [name for name in names if "::" not in name and name not in BUFFERS]

    def shape_of(module: str) -> tuple[int, ...]:
        rows, columns = (int(size) for size in files.read(f"{module}{SHAPE}").tolist())
        return (rows, columns, 1, 1) if module.endswith(CONVOLUTIONS) else (rows, columns)

    original = {f"{module}.weight": shape_of(module) for module in modules}
    original |= {name: files.shape(name) for name in plain}
    shapes = {new: part for name, shape in original.items() for new, part in rename(name, shape).shapes().items()}

    def items() -> Iterator[Item]:
        for module in modules:
            name = f"{module}.weight"
            yield from rename(name, original[name]).split(_decode(module, files, original[name]))
        for name in plain:
            tensor = files.read(name)
            # Every 8-bit float is a 16-bit one.
            tensor = tensor.half() if tensor.dtype in _FLOAT8 else tensor
            yield from rename(name, original[name]).split(tensor)

    return ForeignModel("Clark pack", config or sana_config(original, source=str(file)), shapes, items)


def _decode(module: str, files: SafetensorsFiles, shape: tuple[int, ...]) -> torch.Tensor:
    rows, columns = shape[:2]
    packed = files.read(f"{module}{CODES}")
    scale = files.read(f"{module}{SCALE}").float()
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, -(-columns // 4)):
        raise ValueError(
            f"{module}{CODES} is {packed.dtype} {list(packed.shape)}, but {[rows, columns]} weights need "
            f"uint8 {[rows, -(-columns // 4)]}. The file is damaged."
        )
    if scale.dim() != 2 or scale.shape[0] != rows or columns % scale.shape[1]:
        raise ValueError(f"{module}{SCALE} is {list(scale.shape)}, which does not divide {[rows, columns]} weights.")
    levels = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(rows, -1)[:, :columns]
    if bool((levels == 3).any()):
        raise ValueError(f"{module}{CODES} holds level 3; levels are 0..2. The file is damaged.")
    scales = scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return ((levels.float() - 1) * scales).reshape(shape)
