# SPDX-License-Identifier: Apache-2.0
"""Files that are complete or absent, each with its SHA-256 beside it (`sha256sum -c *.sha256` checks them)."""

import hashlib
import pathlib
from collections.abc import Mapping

import torch
from safetensors.torch import save

from ..files import file_sha256, write_bytes


SUFFIX = ".sha256"


def write_tensors(path: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file and its hash.

    Raises:
        OSError: if it cannot be written (disk full, no permission); nothing half-written stays behind.
    """
    data = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    write_bytes(path, data)
    digest = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"
    # The hash comes last: a file without one is not complete.
    write_bytes(hash_path(path), digest.encode())


def hash_path(path: pathlib.Path) -> pathlib.Path:
    """Where the hash of a file lies."""
    return path.with_name(path.name + SUFFIX)


def find_fault(path: pathlib.Path) -> str | None:
    """Why a file is not to be used: missing, incomplete or corrupted; `None` if it is as it was written."""
    if not path.is_file():
        return "is missing"
    if not hash_path(path).is_file():
        return "has no hash, so it may be incomplete"
    recorded = hash_path(path).read_text(encoding="utf-8", errors="replace").split()
    if not recorded or recorded[0] != file_sha256(path):
        return "is corrupted (its SHA-256 is not the recorded one)"
    if recorded[1:] != [path.name]:
        return f"is {' '.join(recorded[1:]) or 'another file'} under another name"
    return None
