# SPDX-License-Identifier: Apache-2.0
"""What a teacher cache was made from, and how its rows become the denoiser's inputs again, as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from ..files import parse_json_object
from ..rollouts import fingerprint, prompts_sha256
from .layout import KINDS, Branch, InputLayout, Path


FORMAT_VERSION = 1
_NULL_ROW = "null_row"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a cache but its tensors.

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

    def to_files(self) -> tuple[str, dict[str, torch.Tensor]]:
        """The JSON text, and the tensors that it refers to.

        Raises:
            ValueError: if the pipeline passes something to the denoiser that is not data.
        """
        tensors: dict[str, torch.Tensor] = {}
        layout = self.layout
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "shard_prompts": self.shard_prompts,
            "layout": {
                "sample": layout.sample,
                "timestep": layout.timestep,
                "listed": layout.listed,
                "position": layout.position,
                "conditional": _branch_to_json(layout.conditional, "conditional", tensors),
                "unconditional": None
                if layout.unconditional is None
                else _branch_to_json(layout.unconditional, "unconditional", tensors),
            },
            "prompts": list(self.prompts),
        }
        for path, tensor in (layout.null_row or {}).items():
            tensors[join(_NULL_ROW, path)] = tensor
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n", tensors

    @classmethod
    def from_files(cls, path: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> "Manifest":
        """Reads what [`to_files`] gave.

        Raises:
            ValueError: if the JSON is damaged, or of a newer format.
        """
        content = read_manifest(path)
        try:
            layout = content["layout"]
            null_row = {split(name)[1]: tensor for name, tensor in tensors.items() if split(name)[0] == _NULL_ROW}
            guided = layout["unconditional"]
            prompts = prompts_sha256(content["prompts"])
            if content["fingerprint"] != fingerprint(**content["identity"]):
                raise KeyError("its fingerprint is of another identity")
            if content["identity"].get("prompts_sha256", prompts) != prompts:
                raise KeyError("its prompts are others than were cached")
            return cls(
                identity=content["identity"],
                prompts=tuple(content["prompts"]),
                shard_prompts=content["shard_prompts"],
                layout=InputLayout(
                    sample=layout["sample"],
                    timestep=layout["timestep"],
                    listed=layout["listed"],
                    conditional=_branch_from_json(layout["conditional"], tensors),
                    unconditional=None if guided is None else _branch_from_json(guided, tensors),
                    null_row=null_row if guided is not None else None,
                    position=layout["position"],
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Delete the folder and cache again.") from error


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest without its tensors.

    Raises:
        ValueError: if the JSON is damaged, or of a newer format.
    """
    try:
        content = parse_json_object(path.read_bytes(), source=path)
        version = content["format_version"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Delete the folder and cache again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this diffusers-ternary reads {FORMAT_VERSION}. Use the version "
            "that wrote it, or another folder."
        )
    return content


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two identities, e.g. `scheduler.shift: 3.0 there, 1.0 here`."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        there, here = old.get(name), new.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += find_differences(there, here, f"{prefix}{name}.")
        elif there != here:
            found.append(f"{prefix}{name}: {_short(there)} there, {_short(here)} here")
    return found


def json_values(value: Any) -> Any:
    """`value` as it comes back from JSON; what JSON does not know appears as its `repr`."""
    return json.loads(json.dumps(value, default=repr, sort_keys=True))


def join(name: str, path: Path) -> str:
    """Key of a tensor."""
    return "/".join((name, *path))


def split(key: str) -> tuple[str, Path]:
    """Name and path of a key."""
    name, *path = key.split("/")
    return name, tuple(path)


def _branch_to_json(branch: Branch, name: str, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    entries = []
    for path, kind in branch.kinds.items():
        entry: dict[str, Any] = {"path": list(path), "kind": kind}
        if path in branch.shared:
            entry["shared"] = _encode(branch.shared[path], join(name, path), tensors)
        entries.append(entry)
    return entries


def _branch_from_json(entries: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Branch:
    kinds, shared = {}, {}
    for entry in entries:
        path = tuple(entry["path"])
        if entry["kind"] not in KINDS:
            raise KeyError(entry["kind"])
        kinds[path] = entry["kind"]
        if "shared" in entry:
            shared[path] = _decode(entry["shared"], tensors)
    return Branch(kinds, shared)


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"
