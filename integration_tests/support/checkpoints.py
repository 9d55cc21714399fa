# SPDX-License-Identifier: Apache-2.0
"""Reads and rewrites packed files, for tests that damage them."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


METADATA_KEY = "diffusers_ternary"
Tensors = dict[str, torch.Tensor]


def read_file(file: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()  # noqa: SIM118


def crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def rewrite(file: Path, change: Callable[[Tensors, dict[str, Any]], None], *, checksums: bool) -> None:
    """Applies `change(tensors, packed metadata)` to a file in place.

    With `checksums` the stored ones are made to fit the changed tensors, so that it is the next check that must
    notice the damage.
    """
    tensors, metadata = read_file(file)
    body = json.loads(metadata[METADATA_KEY])
    change(tensors, body)
    if checksums:
        body["crc32"] = {name: crc32(tensor) for name, tensor in tensors.items()}
    file.unlink()  # it may still be mapped by a model; a new file leaves that one alone
    save_file(tensors, file, {**metadata, METADATA_KEY: json.dumps(body)})


def flip_bit(file: Path, tensor: str) -> None:
    """Flips one bit in the middle of a tensor's data, below the level of any library."""
    data = bytearray(file.read_bytes())
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    start, stop = header[tensor]["data_offsets"]
    data[8 + header_size + (start + stop) // 2] ^= 1
    file.unlink()
    file.write_bytes(bytes(data))


def edit_json(file: Path, **changes: Any) -> None:
    """Sets entries of a JSON file; `None` deletes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def to_original_z_image(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of diffusers' `convert_z_image_transformer_checkpoint_to_diffusers`."""
    original = {}
    for name, tensor in tensors.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            name, tensor = name.replace(".to_q.", ".qkv."), torch.cat(parts)
        for ours, theirs in {
            "all_final_layer.2-1.": "final_layer.",
            "all_x_embedder.2-1.": "x_embedder.",
            ".to_out.0.": ".out.",
            ".norm_k.": ".k_norm.",
            ".norm_q.": ".q_norm.",
        }.items():
            name = name.replace(ours, theirs)
        original[name] = tensor
    return original
