# SPDX-License-Identifier: Apache-2.0
"""What is to be pushed: a folder of packed weights, read and checked before anything is sent."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..backend import bits_per_weight, packed_layers
from ..backend.folder import model_name, pipeline_parts, refuse_links, shard_names
from ..backend.packed_folder import PackedFolder
from ..files import read_json
from ..format import LayerSpec, TernarySpec
from ..interop.inspection import Component, inspect_folder


CARD = "README.md"
DENSE = "bf16"
"""Folder of the dequantized copy in a repository."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder that passed all checks.

    Args:
        class_name (`str`): of the pipeline or model.
        library (`str`): `"diffusers"` or `"transformers"`.
        is_pipeline (`bool`): whether there is a `model_index.json`.
        components (`tuple[Component, ...]`): what the weight files hold; one for a model on its own.
        packed (`Mapping[str, PackedFolder]`): the packed models by component; `""` for a model on its own.
        files (`Mapping[str, Path]`): path in the repository → file, without the card and an older dequantized copy.
        card (`Path`, *optional*): README.md of the folder, written by hand or by an earlier push.
    """

    class_name: str
    library: str
    is_pipeline: bool
    components: tuple[Component, ...]
    packed: Mapping[str, PackedFolder]
    files: Mapping[str, pathlib.Path]
    card: pathlib.Path | None

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """All packed layers: `COMPONENT.LAYER`, and `.LAYER` of a model on its own."""
        return {
            f"{component}.{name}": spec
            for component, model in self.packed.items()
            for name, spec in model.layout.layers.items()
        }

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per converted weight of all packed models."""
        return bits_per_weight(self.specs)

    @property
    def ternary_layers(self) -> int:
        """Ternary layers of all packed models."""
        return sum(isinstance(spec, TernarySpec) for spec in self.specs.values())

    @property
    def format_version(self) -> int:
        """Of the packed format."""
        return max(model.layout.format_version for model in self.packed.values())

    @property
    def weights_sha256(self) -> str:
        """Hash of the packed models: layers and the checksums of all their tensors, however they are sharded."""
        content = {
            component: [
                {name: spec.to_json() for name, spec in sorted(model.layout.layers.items())},
                {name: model.layout.checksums.get(name) for name in sorted(model.tensors)},
            ]
            for component, model in self.packed.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_source(folder: str | os.PathLike[str]) -> Source:
    """Reads and checks a folder that `save_pretrained` wrote: structure, headers, and all values of packed models.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is neither a pipeline nor a model, incomplete, damaged, or not packed.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder. Give the folder that save_pretrained or quantize wrote.")
    refuse_links(root)
    index = read_json(root / "model_index.json")
    config = read_json(root / "config.json")
    if index is not None:
        # Custom pipelines name their file first.
        named_class = index.get("_class_name")
        named_class = named_class[-1] if isinstance(named_class, list) and named_class else named_class
        library, class_name = "diffusers", str(named_class)
        folders = {name: root / name for name in pipeline_parts(index, source=root)}
    elif config is not None:
        library, class_name = model_name(config)
        folders = {"": root}
    else:
        raise ValueError(
            f"{root} holds neither model_index.json (a pipeline) nor config.json (a model). Give a folder that "
            "save_pretrained wrote."
        )
    components: list[Component] = []
    packed: dict[str, PackedFolder] = {}
    for name, path in folders.items():
        _check_complete(path)
        if any(path.glob("*.safetensors")):
            components += inspect_folder(path, name or class_name)
            model = PackedFolder.find(path)
            if model is not None:
                model.check_values()
                packed[name] = model
    if not packed:
        raise ValueError(
            f"{root} holds no packed weights. Quantize or calibrate first: diffusers-ternary quantize {root} DST"
        )
    card = root / CARD
    return Source(
        class_name=class_name,
        library=library,
        is_pipeline=index is not None,
        components=tuple(components),
        packed=packed,
        files=dict(_files(root)),
        card=card if card.is_file() else None,
    )


def _check_complete(folder: pathlib.Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(
            f"{folder} is missing or empty, but model_index.json names it. Save the pipeline again, completely."
        )
    for index in sorted(folder.glob("*.index.json")):
        shards = shard_names(read_json(index) or {}, source=index)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{index} names {', '.join(missing)}, which is not there. Save or download it again.")
    config = read_json(folder / "config.json") or {}
    # Every model has one of these in its config; schedulers and tokenizers have other files.
    is_model = "_class_name" in config or "architectures" in config
    if is_model and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise ValueError(f"{folder} holds a config.json but no weights. Save or download it again, completely.")


def _files(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    for folder, subfolders, names in os.walk(root):
        top = pathlib.Path(folder) == root
        subfolders[:] = sorted(
            name
            for name in subfolders
            # A copy of other weights than these may be in it; push_to_hub makes its own.
            if not name.startswith(".") and name != "__pycache__" and not (top and name == DENSE)
        )
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            if not name.startswith(".") and path.is_file() and not (top and name == CARD):
                yield path.relative_to(root).as_posix(), path


def stage(pipeline_or_model: Any, destination: pathlib.Path) -> pathlib.Path:
    """The folder of a packed pipeline or model, which is written if it is in memory, always with the same bytes.

    Args:
        pipeline_or_model: a path is returned as it is.
        destination (`Path`): where a model in memory is saved.

    Raises:
        TypeError: for anything that is not a path, no pipeline and no model with `save_pretrained`.
        ValueError: if no layer is packed.
    """
    if isinstance(pipeline_or_model, (str, os.PathLike)):
        return pathlib.Path(pipeline_or_model)
    kind = type(pipeline_or_model).__name__
    if not hasattr(pipeline_or_model, "save_pretrained"):
        raise TypeError(f"push_to_hub takes a pipeline, a model, or the folder of one, got {kind}.")
    components = getattr(pipeline_or_model, "components", {"": pipeline_or_model})
    if not any(isinstance(part, nn.Module) and packed_layers(part) for part in components.values()):
        raise ValueError(f"{kind} holds no packed layers. Quantize it first: diffusers_ternary.quantize(model)")
    pipeline_or_model.save_pretrained(destination)
    for file in destination.rglob("*.safetensors"):
        sort_metadata(file)
    return destination


def sort_metadata(file: pathlib.Path) -> None:
    """Puts the metadata of a safetensors header into alphabetical order, in place.

    safetensors writes it in the random order of a hash map: the same model, saved again, would be another file to
    the Hub, and an interrupted push would send everything a second time.
    """
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same entries take the same room; should another version of safetensors escape them otherwise, the file
        # stays as it is.
        if len(text) <= size:
            handle.seek(8)
            handle.write(text.ljust(size))
