# SPDX-License-Identifier: Apache-2.0
"""Records that vouch for themselves and for tensors: what was changed afterward is noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import new_file
from .documents import parse_json_object
from .names import PathLike


SEAL = "sha256"


def seal(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """A record with the hash of itself and of tensors under `"sha256"`.

    Args:
        record (`Mapping[str, Any]`): JSON values. Say in it what it is of, so that it cannot stand for another one.
        tensors (`Mapping[str, torch.Tensor]`, *optional*): stored with it, by name.
    """
    return {**record, SEAL: _sha256(record, tensors or {})}


def is_sealed(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> bool:
    """Whether a record and its tensors are as [`seal`] saw them."""
    content = {name: value for name, value in record.items() if name != SEAL}
    return record.get(SEAL) == _sha256(content, tensors or {})


def write_sealed(
    path: PathLike, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, metadata_key: str
) -> None:
    """Writes a safetensors file with a sealed record in its metadata: the old file or the new one, never a part.

    Args:
        path (`str` or `os.PathLike`): the file.
        record (`Mapping[str, Any]`), tensors (`Mapping[str, torch.Tensor]`): see [`seal`].
        metadata_key (`str`): of the record.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_file(path) as temporary:
        save_file(stored, temporary, metadata={metadata_key: json.dumps(seal(record, stored))})


def read_sealed(path: PathLike, *, metadata_key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors that [`write_sealed`] wrote.

    Raises:
        ValueError: says why it is not to be used: it cannot be read, or is not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(metadata_key, "")
            record = parse_json_object(text, source=path)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not is_sealed(record, tensors):
        raise ValueError(f"{path} is not as it was written")
    return record, tensors


def _sha256(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([record, described], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()
