# SPDX-License-Identifier: Apache-2.0
"""Packed denoisers to export, one of each architecture that GGUF files know, and what has to be in the files."""

import functools
import pathlib

import torch

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend.packed_folder import PackedFolder
from diffusers_ternary.interop.gguf_names import gguf_tensors

from . import denoisers


# All packed layers have inputs of a multiple of 256.
GGUF = {
    "flux": denoisers.flux,
    "flux2": denoisers.flux2,
    "sd35": denoisers.sd35_medium,
    "z_image": functools.partial(denoisers.z_image, 12, (16, 24, 24), layers=1),
    "qwen_image": functools.partial(denoisers.qwen_image, 4, (16, 24, 24)),
}


def pack(folder: pathlib.Path, architecture: str, *, group_size: int | None) -> dict[str, torch.Tensor]:
    """Packs a model of `GGUF` in bfloat16, some layers as int8; float32 tensors by their names in GGUF files."""
    torch.manual_seed(0)
    config = TernaryConfig(group_size=group_size, scale_layout="group", overrides={"*.norm1.linear": "int8"})
    quantize(GGUF[architecture]().to(torch.bfloat16), config).save_pretrained(folder)
    model = PackedFolder.open(folder)
    tensors = gguf_tensors(model.class_name, model.names())
    return {tensor.name: tensor.join([model.dequantize(name) for name in tensor.parts]) for tensor in tensors}
