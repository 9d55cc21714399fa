# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 8-bit floats with scales ("fp8 scaled"): the weight is the stored value times a scale beside it.

| who | scale | beside it |
|---|---|---|
| ComfyUI, until 2025 | `NAME.scale_weight` | `NAME.scale_input`, a tensor `scaled_fp8` for the whole file |
| ComfyUI, since | `NAME.weight_scale` | `NAME.input_scale`, `NAME.comfy_quant` (JSON in bytes) |
| Black Forest Labs, ModelOpt, compressed-tensors, FBGEMM | `NAME.weight_scale` | `NAME.input_scale`, `.output_scale` |
| DeepSeek, transformers' fine-grained FP8 | `NAME.weight_scale_inv` (not an inverse) | `NAME.activation_scale` |

A scale is one number, one for each row (`[N]`, `[N, 1]`), or one for each block (`[N / a, K / b]`, `[N, K / b, 1]`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..files import parse_json_object
from ..format import DTYPE_NAMES, TensorHeader


_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Of activations: a ternary model quantizes its own.
_UNUSED = ("scale_input", "input_scale", "output_scale", "activation_scale", "input_scale_ub", "comfy_quant")
_MARKER = "scaled_fp8"
_FINE_BLOCK = 128
_LARGE = 8 << 30
_FLOATS = ("F64", "F32", "F16", "BF16")
_REMEDY = "Load the float checkpoint of the model."


class Header(Protocol):
    """What a file says of a tensor."""

    @property
    def dtype(self) -> str:
        """In safetensors' notation."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scales of a weight, each of which holds for a block of its matrix `[N, K]`.

    Args:
        table (`torch.Tensor`): float32 `[ceil(N / rows), ceil(K / columns)]`.
        rows (`int`), columns (`int`): of a block.
    """

    table: torch.Tensor
    rows: int
    columns: int

    def apply(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight in float32."""
        matrix = stored.float().reshape(stored.shape[0] if stored.dim() else 1, -1)
        table = self.table.to(stored.device)
        if table.shape[0] > 1:
            table = table.repeat_interleave(self.rows, dim=0)[: matrix.shape[0]]
        if table.shape[1] > 1:
            table = table.repeat_interleave(self.columns, dim=1)[:, : matrix.shape[1]]
        return (matrix * table).view(stored.shape)


@dataclasses.dataclass(frozen=True)
class Float8Scales:
    """What a checkpoint of 8-bit floats stores beside its weights.

    Args:
        scales (`dict[str, Scale]`): name of a weight → its scale.
        extras (`frozenset[str]`): tensors that belong to the quantization and are not parameters of the model.
    """

    scales: dict[str, Scale] = dataclasses.field(default_factory=dict)
    extras: frozenset[str] = frozenset()

    def weight(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A weight in float32, formed of what is stored; of a weight without a scale, what is stored."""
        return self.scales[name].apply(stored) if name in self.scales else stored


def find_float8_scales(
    headers: Mapping[str, Header], read: Callable[[str], torch.Tensor], *, source: str
) -> Float8Scales:
    """Finds the scales of a checkpoint's 8-bit floats; empty for every other checkpoint.

    Args:
        headers (`Mapping[str, Header]`): all tensors.
        read (`Callable`): reads a small tensor.
        source (`str`): for messages.

    Raises:
        ValueError: if something of the quantization is not understood; names the tensor.
    """
    scales: dict[str, Scale] = {}
    extras: set[str] = set()
    for name, header in headers.items():
        layer, _, part = name.rpartition(".")
        weight = f"{layer}.weight" if layer else "weight"
        if part == _MARKER:
            extras.add(name)
        elif part in _UNUSED and weight in headers:
            extras.add(name)
            if part == "comfy_quant":
                _check_comfy(read(name), f"{source}: {name}")
        elif part in _SCALES:
            if weight not in headers:
                raise ValueError(f"{source}: {name} is the scale of a weight that is not there. {_REMEDY}")
            if headers[weight].dtype not in _FLOAT8 or header.dtype not in _FLOATS:
                raise ValueError(
                    f"{source}: {weight} is {headers[weight].dtype} with the scale {name} ({header.dtype}), a "
                    f"quantization that is not read here. {_REMEDY}"
                )
            if weight in scales:
                raise ValueError(f"{source}: {weight} has two scales ({name} is one of them). {_REMEDY}")
            extras.add(name)
            scales[weight] = _read_scale(f"{source}: {name}", read(name).float(), headers[weight].shape)
        elif weight in headers and headers[weight].dtype in _FLOAT8 and _is_suspicious(part):
            raise ValueError(
                f"{source}: {weight} is an 8-bit float with {name} beside it, a quantization that is not read here. "
                f"{_REMEDY}"
            )
    return Float8Scales(scales, frozenset(extras))


def _is_suspicious(part: str) -> bool:
    return part != "weight" and any(word in part for word in ("scale", "scalar", "quant", "amax", "zero_point"))


def _check_comfy(tensor: torch.Tensor, source: str) -> None:
    settings = parse_json_object(bytes(tensor.flatten().to(torch.uint8).tolist()), source=source, remedy=_REMEDY)
    known = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "params"}
    unknown = [name for name, value in settings.items() if name not in known and value]
    if not str(settings.get("format", "")).startswith("float8_") or unknown:
        raise ValueError(f"{source} says {settings}, a quantization that is not read here. {_REMEDY}")


def _read_scale(name: str, scale: torch.Tensor, shape: tuple[int, ...]) -> Scale:
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise ValueError(f"{name} holds NaN, Inf or negative scales. {_REMEDY}")
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    if scale.numel() == 1:
        return Scale(scale.reshape(1, 1), rows, columns)
    table = scale.flatten(1) if scale.dim() > 1 else scale[:, None]
    sides = list(zip((rows, columns), table.shape, strict=True))
    # Blocks of a matrix are 128 x 128, as DeepSeek made them; [N, K / b, 1] divides rows evenly.
    if scale.dim() == 2 and all(-(-size // _FINE_BLOCK) == count for size, count in sides):
        return Scale(table, _FINE_BLOCK, _FINE_BLOCK)
    block = [_block_size(size, count) for size, count in sides]
    if 0 in block or not 1 <= scale.dim() <= 3 or (scale.dim() == 3 and 1 not in scale.shape[1:]):
        raise ValueError(f"{name} is {list(scale.shape)}, which does not divide the weight {list(shape)}. {_REMEDY}")
    return Scale(table, *block)


def _block_size(size: int, count: int) -> int:
    """How many share a scale; 0 if there is no answer."""
    if not 0 < count <= size:
        return 0
    if size % count == 0:
        return size // count
    return next((1 << power for power in range(4, 16) if -(-size // (1 << power)) == count), 0)


def headers_of(state_dict: Mapping[str, Any]) -> dict[str, TensorHeader]:
    """What the headers of a file would say of the tensors in a state dict; other values are left out."""
    return {
        name: TensorHeader(DTYPE_NAMES.get(value.dtype, "?"), tuple(value.shape))
        for name, value in state_dict.items()
        if type(value) in (torch.Tensor, torch.nn.Parameter)
    }


def unscale_state_dict(state_dict: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A state dict with the values of its 8-bit floats, without what belongs to their quantization.

    They become float32, or bfloat16 where float32 would take more than 8 GiB.

    Raises:
        ValueError: see [`find_float8_scales`].
    """
    found = find_float8_scales(headers_of(state_dict), state_dict.__getitem__, source=source)
    size = 4 * sum(state_dict[name].numel() for name in found.scales)
    dtype = torch.float32 if size <= _LARGE else torch.bfloat16
    values = {name: value for name, value in state_dict.items() if name not in found.extras}
    for name in found.scales:
        values[name] = found.weight(name, values[name]).to(dtype)
    return values
