# SPDX-License-Identifier: Apache-2.0
"""The versions of the embedded model that the demo shows side by side."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from ..backend import bits_per_weight, file_bytes, packed_layers
from ..backend.config import TernaryConfig
from ..backend.quantize import quantize
from .pipeline import DATA, demo_pipeline


FLOAT_BITS = 16  # the embedded weights are bfloat16


@dataclasses.dataclass(frozen=True)
class Variant:
    """One version of the embedded pipeline.

    Args:
        name (`str`): in the table, the contact sheet and the JSON.
        load (`Callable[[torch.dtype], DiffusionPipeline]`): makes a pipeline of its own, independent of the other
            variants; the dtype is that of what is not packed.
        description (`str`): one line for people.
    """

    name: str
    load: Callable[[torch.dtype], DiffusionPipeline]
    description: str


@dataclasses.dataclass(frozen=True)
class Size:
    """What the denoiser takes in a file, without the file's header.

    Args:
        bits_per_weight (`float`): of the converted weights, with all that is stored for them; 16 if none are.
        bytes (`int`): of all weights of the denoiser; what is not converted counts as bfloat16.
    """

    bits_per_weight: float
    bytes: int


def _teacher(dtype: torch.dtype) -> DiffusionPipeline:
    return demo_pipeline(torch_dtype=dtype)


def _rounded(dtype: torch.dtype) -> DiffusionPipeline:
    return quantize(demo_pipeline(torch_dtype=dtype), TernaryConfig())


def _embedded(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    pipeline = demo_pipeline(torch_dtype=dtype)
    pipeline.transformer = FluxTransformer2DModel.from_pretrained(DATA / name, dtype=dtype)
    return pipeline


TEACHER = Variant("teacher", _teacher, "the embedded model, bfloat16")
STUDENTS = (
    Variant("rounded", _rounded, "TernaryConfig(): every weight rounded on its own, nothing calibrated"),
    Variant(
        "calibrated",
        functools.partial(_embedded, "calibrated"),
        "calibrate(): the same bits, codes and scales chosen on 256 prompts' rollouts",
    ),
    Variant(
        "distilled",
        functools.partial(_embedded, "distilled"),
        "distill(): the same bits, trained on the teacher's outputs for 2,048 prompts",
    ),
)


def find_variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        ValueError: if there is none.
    """
    variants = {variant.name: variant for variant in (TEACHER, *STUDENTS)}
    if name not in variants:
        raise ValueError(f"The demo has no variant {name!r}. Choose from {', '.join(variants)}.")
    return variants[name]


def stored_size(denoiser: torch.nn.Module) -> Size:
    """The size of a float or quantized denoiser as `save_pretrained` stores it in bfloat16."""
    layers = packed_layers(denoiser)
    specs = {name: layer.spec for name, layer in layers.items()}
    packed = {f"{name}.{part}" for name, layer in layers.items() for part in layer.packed_names}
    kept = sum(tensor.numel() for name, tensor in denoiser.state_dict().items() if name not in packed)
    return Size(
        bits_per_weight=bits_per_weight(specs) if specs else float(FLOAT_BITS),
        bytes=sum(file_bytes(spec) for spec in specs.values()) + kept * FLOAT_BITS // 8,
    )
