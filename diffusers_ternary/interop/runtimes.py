# SPDX-License-Identifier: Apache-2.0
"""What a packed denoiser would take in each program that it can be exported to; nothing is written."""

import dataclasses
import math
import pathlib
from typing import Any

from ..backend import StoredTensor
from ..backend.packed_folder import PackedFolder
from ..format import Int8Spec
from .export import open_packed
from .gguf_blocks import BLOCK, BLOCK_BYTES, RUNTIMES
from .gguf_export import float_type, gguf_form
from .gguf_names import gguf_tensors
from .mflux_export import check_mflux
from .mlx_affine import affine_group_size, narrowest


# They unpack the weight of a layer to 16 bits before they multiply by it.
_UNPACKING = ("comfyui", "diffusers")
_FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class RuntimeSize:
    """A denoiser in one program.

    Args:
        runtime (`str`): `"diffusers-ternary"`, `"mflux"`, or a program of `RUNTIMES`.
        bytes (`int`): of the tensors in the file.
        memory (`int`): of the weights while the program runs, and of one unpacked layer where it unpacks them.
            Activations, text encoders and autoencoder come on top.
        reason (`str`): why it cannot be exported; empty if it can.
    """

    runtime: str
    bytes: int = 0
    memory: int = 0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return dataclasses.asdict(self)


def runtime_sizes(path: pathlib.Path) -> list[RuntimeSize]:
    """Size and expected memory of a packed denoiser in every program.

    Args:
        path (`Path`): packed model folder, or the pipeline folder it is in.

    Raises:
        ValueError: if it is not packed, or damaged.
    """
    model = open_packed(path)
    return [_own(model), *(_gguf(model, runtime) for runtime in RUNTIMES), _mflux(model)]


def _own(model: PackedFolder) -> RuntimeSize:
    kept = sum(tensor.bytes for tensor in _kept(model).values())
    layers = model.layout.layers.values()
    memory = sum(
        math.prod(part.shape) * part.dtypes[0].itemsize for spec in layers for part in spec.memory_tensors().values()
    )
    return RuntimeSize("diffusers-ternary", sum(tensor.bytes for tensor in model.tensors.values()), kept + memory)


def _kept(model: PackedFolder) -> dict[str, StoredTensor]:
    return {name: model.tensors[name] for name in model.names() if model.spec(name) is None}


def _gguf(model: PackedFolder, runtime: str) -> RuntimeSize:
    form = gguf_form(runtime)
    try:
        form.check(model)
    except ValueError as error:
        return RuntimeSize(runtime, reason=str(error))
    size = largest = 0
    for tensor in gguf_tensors(model.class_name, model.names()):
        kind = form.type_of(model, tensor)[0] or ""
        specs = [model.spec(name) for name in tensor.parts]
        weights = sum(spec.weights for spec in specs if spec is not None)
        if kind in BLOCK:
            size += weights // BLOCK[kind] * BLOCK_BYTES[kind]
            largest = max(largest, weights)
        else:
            parts = [model.tensors[name] for name in tensor.parts]
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            size += math.prod(shape) * _FLOAT_BYTES[float_type(tensor.name, parts[0].dtype, shape)]
    return RuntimeSize(runtime, size, size + (2 * largest if runtime in _UNPACKING else 0))


def _mflux(model: PackedFolder) -> RuntimeSize:
    try:
        check_mflux(model)
    except ValueError as error:
        return RuntimeSize("mflux", reason=str(error))
    size = sum(tensor.bytes for tensor in _kept(model).values())
    for layer, spec in model.layout.layers.items():
        scales = narrowest(model.group_scales(f"{layer}.weight")).itemsize
        groups = spec.weights // (affine_group_size(spec) or spec.in_features)
        size += spec.weights * (8 if isinstance(spec, Int8Spec) else 2) // 8 + 2 * scales * groups
    return RuntimeSize("mflux", size, size)
