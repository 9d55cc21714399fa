# SPDX-License-Identifier: Apache-2.0
"""What a teacher cache was made from, and how its rows become the denoiser's inputs again, as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from ..files import read_json, recover_folder, write_text
from ..rollouts import fingerprint, prompts_sha256
from .layout import KINDS, Branch, InputLayout, join, keys_by_name
from .shards import find_fault, hash_path, write_tensors


FORMAT_VERSION = 1
_MANIFEST, _SHARED = "manifest.json", "shared.safetensors"
_NULL_ROW = "null_row"
_REMEDY = "Delete the folder and cache again."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a cache but its rows.

    Args:
        identity (`Mapping[str, Any]`): what the content depends on: weights, scheduler, call, prompts, ... (JSON).
        prompts (`tuple[str, ...]`): in order.
        shard_prompts (`int`): prompts per shard.
        layout ([`InputLayout`]): how the pipeline calls its denoiser.
    """

    identity: Mapping[str, Any]
    prompts: tuple[str, ...]
    shard_prompts: int
    layout: InputLayout

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(**self.identity)

    def write(self, folder: pathlib.Path) -> None:
        """Writes the manifest, and the tensors that it refers to, into the folder of a cache.

        Raises:
            ValueError: if the pipeline passes something to the denoiser that is not data.
        """
        null_row = self.layout.null_row or {}
        tensors = {join(_NULL_ROW, path): tensor for path, tensor in null_row.items()}
        branches = {"conditional": self.layout.conditional, "unconditional": self.layout.unconditional}
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "shard_prompts": self.shard_prompts,
            "layout": {
                "sample": self.layout.sample,
                "timestep": self.layout.timestep,
                "listed": self.layout.listed,
                "position": self.layout.position,
                **{
                    name: None if branch is None else _branch_to_json(branch, name, tensors)
                    for name, branch in branches.items()
                },
            },
            "prompts": list(self.prompts),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name in (folder / _SHARED, hash_path(folder / _SHARED), folder / _MANIFEST):
            recover_folder(name)
        write_tensors(folder / _SHARED, tensors)
        write_text(folder / _MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest | None":
        """The manifest of a folder, or `None` if there is none.

        Raises:
            ValueError: if it is damaged, or of a newer format.
        """
        content = read_json(folder / _MANIFEST, remedy=f"It is damaged. {_REMEDY}")
        if content is None:
            return None
        version = content.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{folder / _MANIFEST} has format version {version}; this diffusers-ternary reads {FORMAT_VERSION}. "
                "Use the version that wrote it, or another folder."
            )
        fault = find_fault(folder / _SHARED)
        if fault is not None:
            raise ValueError(f"{folder / _SHARED} {fault}. {_REMEDY}")
        try:
            return cls._parse(content, load_file(folder / _SHARED))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _MANIFEST} is damaged ({error!r}). {_REMEDY}") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Manifest":
        layout, prompts = content["layout"], tuple(content["prompts"])
        if content["fingerprint"] != fingerprint(**content["identity"]):
            raise KeyError("its fingerprint is of another identity")
        sha256 = prompts_sha256(prompts)
        if content["identity"].get("prompts_sha256", sha256) != sha256:
            raise KeyError("its prompts are others than were cached")
        guided = layout["unconditional"] is not None
        null_row = {path: tensors[key] for path, key in keys_by_name(tensors).get(_NULL_ROW, {}).items()}
        return cls(
            identity=content["identity"],
            prompts=prompts,
            shard_prompts=content["shard_prompts"],
            layout=InputLayout(
                sample=layout["sample"],
                timestep=layout["timestep"],
                listed=layout["listed"],
                conditional=_branch_from_json(layout["conditional"], tensors),
                unconditional=_branch_from_json(layout["unconditional"], tensors) if guided else None,
                null_row=null_row if guided else None,
                position=layout["position"],
            ),
        )


def _branch_to_json(branch: Branch, name: str, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    entries = []
    for path, kind in branch.kinds.items():
        entry: dict[str, Any] = {"path": list(path), "kind": kind}
        if path in branch.shared:
            entry["shared"] = _encode(branch.shared[path], join(name, path), tensors)
        entries.append(entry)
    return entries


def _branch_from_json(entries: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Branch:
    unknown = {entry["kind"] for entry in entries} - set(KINDS)
    if unknown:
        raise KeyError(*unknown)
    return Branch(
        kinds={tuple(entry["path"]): entry["kind"] for entry in entries},
        shared={tuple(entry["path"]): _decode(entry["shared"], tensors) for entry in entries if "shared" in entry},
    )


def _encode(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": {name: _encode(item, f"{key}/{name}", tensors) for name, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ValueError(
        f"The denoiser gets {key.replace('/', '.')}={value!r}, a {type(value).__name__}, which a cache cannot keep. "
        "Leave it out of call_kwargs."
    )


def _decode(entry: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, content),) = entry.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _decode(item, tensors) for name, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
