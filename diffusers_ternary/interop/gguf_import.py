# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files of denoisers; ternary layers are recovered exactly."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..extras import import_extra
from ..files import parse_json_object
from .compat import TwoBitType
from .compat import open_reader as open_any_reader
from .empty_model import empty_model
from .foreign_model import ForeignModel, Item
from .gguf_config import config_of_shapes
from .gguf_header import check_header
from .gguf_names import ARCHITECTURES, CONFIG_KEY, GgufTensor, architecture_of, gguf_tensors
from .gguf_two_bit import dequantize_two_bit


PREFIX = "model.diffusion_model."


def open_reader(path: pathlib.Path) -> Any:
    """`gguf.GGUFReader` of a file; its tensors are mapped, not read.

    Raises:
        ValueError: if it is damaged or no GGUF file.
        MissingExtraError: without the `gguf` package.
    """
    try:
        check_header(path)
        reader = open_any_reader(path)
        total = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        if total > path.stat().st_size:
            raise ValueError(f"its tensors are of {total} bytes, more than the whole file")
        return reader
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as GGUF ({reason}). It is damaged or incomplete.") from error


def architecture_field(reader: Any) -> str | None:
    """What the file says its architecture is."""
    field = reader.get_field("general.architecture")
    return None if field is None else str(field.contents())


def gguf_shape(tensor: Any) -> tuple[int, ...]:
    """Shape of a tensor of the file; GGUF counts dimensions from the innermost."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def read_gguf(path: pathlib.Path, config: dict[str, Any] | None) -> ForeignModel:
    """Describes a GGUF file of a denoiser.

    Args:
        path (`Path`): the file.
        config (`dict`, *optional*): config.json of the model; default: what the file was exported with, or what its
            shapes say.

    Raises:
        ValueError: if it is damaged, of another architecture, or a tensor is missing or of another shape.
    """
    reader = open_reader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if any(name.startswith(PREFIX) for name in stored):
        # A whole checkpoint: text encoders and autoencoder lie beside the denoiser.
        stored = {name.removeprefix(PREFIX): part for name, part in stored.items() if name.startswith(PREFIX)}
    architecture = architecture_field(reader) or architecture_of(stored)
    if architecture is None or architecture not in ARCHITECTURES.values():
        raise ValueError(
            f"{path} is a GGUF file of the architecture {architecture or 'unknown'}. Only "
            f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))} are known here."
        )
    config = config or _embedded_config(reader) or config_of_shapes(architecture, _shapes(stored), source=str(path))
    class_name = config.get("_class_name", "?")
    if ARCHITECTURES.get(class_name) != architecture:
        raise ValueError(f"{path} is a {architecture} GGUF, but its config.json is of {class_name}.")
    model = empty_model(config, _shapes(stored), source=str(path))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = gguf_tensors(class_name, expected.keys())
    _check(path, tensors, expected, _shapes(stored))

    def items() -> Iterator[Item]:
        for tensor in tensors:
            dense = _read(stored[tensor.name]).reshape(_joined_shape(tensor, expected))
            yield from tensor.split(dense, [expected[name][0] for name in tensor.parts])

    return ForeignModel("GGUF", config, expected, items)


def _embedded_config(reader: Any) -> dict[str, Any] | None:
    field = reader.get_field(CONFIG_KEY)
    if field is None:
        return None
    return parse_json_object(
        str(field.contents()), source=f"the {CONFIG_KEY} of the GGUF file", remedy="Give --config."
    )


def _shapes(stored: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: gguf_shape(tensor) for name, tensor in stored.items()}


def _joined_shape(tensor: GgufTensor, expected: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    first = expected[tensor.parts[0]]
    return (sum(expected[name][0] for name in tensor.parts), *first[1:])


def _check(
    path: pathlib.Path,
    tensors: list[GgufTensor],
    expected: dict[str, tuple[int, ...]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    names = {tensor.name for tensor in tensors}
    missing, unexpected = sorted(names - shapes.keys()), sorted(shapes.keys() - names)
    if missing or unexpected:
        some = ", ".join((missing or unexpected)[:3])
        raise ValueError(
            f"{path}: {len(missing)} tensors are missing and {len(unexpected)} unexpected ({some}). The file belongs "
            "to another variant of the architecture, or is incomplete."
        )
    for tensor in tensors:
        wanted = _joined_shape(tensor, expected)
        # Programs differ in whether they keep dimensions of size 1.
        if [size for size in shapes[tensor.name] if size != 1] != [size for size in wanted if size != 1]:
            raise ValueError(
                f"{path}: {tensor.name} is {list(shapes[tensor.name])}, but config.json asks for {list(wanted)}. Give "
                "the model's own config.json (--config)."
            )


def _read(tensor: Any) -> torch.Tensor:
    """A tensor as torch: floats in their dtype, quantized ones dequantized to float32."""
    gguf = import_extra("gguf", "Reading GGUF files")
    kind = tensor.tensor_type.name
    data = np.ascontiguousarray(tensor.data)
    if isinstance(tensor.tensor_type, TwoBitType):
        return torch.from_numpy(dequantize_two_bit(data, tensor.tensor_type))
    if kind == "F16":
        return torch.from_numpy(data.copy())
    if kind == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16)
    if kind != "F32":
        try:
            data = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{tensor.name} is {kind}, which the gguf package cannot unpack.") from error
        return torch.from_numpy(data)
    return _narrowest(torch.from_numpy(data.copy()))


def _narrowest(tensor: torch.Tensor) -> torch.Tensor:
    """GGUF files keep biases and norms in float32; back to 16 bits where that is what they came from."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if torch.equal(narrow.float(), tensor):
            return narrow
    return tensor
