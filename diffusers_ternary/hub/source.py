# SPDX-License-Identifier: Apache-2.0
"""What is to be pushed: a folder of packed weights, read and checked before anything is sent."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..backend import StoredTensor, bits_per_weight, check_headers, read_headers
from ..backend.checkpoint import check_values
from ..backend.config import QUANT_METHOD
from ..backend.folder import default_files, pipeline_parts, quant_method, refuse_links, shard_names
from ..files import read_json
from ..format import FileLayout, TernarySpec
from ..interop.inspection import Component, inspect_path


CARD = "README.md"
DENSE = "bf16"
"""Folder of the dequantized copy in a repository."""


@dataclasses.dataclass(frozen=True)
class PackedModel:
    """One packed model of a source.

    Args:
        name (`str`): component of the pipeline; empty for a model on its own.
        class_name (`str`), library (`str`): of the model, `"diffusers"` or `"transformers"`.
        folder (`Path`): where its files are.
        layout ([`FileLayout`]): its packed layers and checksums.
        tensors (`Mapping[str, StoredTensor]`): all tensors, packed or kept.
    """

    name: str
    class_name: str
    library: str
    folder: pathlib.Path
    layout: FileLayout
    tensors: Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder that passed all checks.

    Args:
        root (`Path`): the folder.
        class_name (`str`): of the pipeline or model.
        library (`str`): `"diffusers"` or `"transformers"`.
        is_pipeline (`bool`): whether there is a `model_index.json`.
        components (`tuple[Component, ...]`): what the weight files hold; one for a model on its own.
        packed (`tuple[PackedModel, ...]`): those that are packed.
        files (`Mapping[str, Path]`): path in the repository → file, without the card and an older dequantized copy.
        card (`Path`, *optional*): README.md of the folder, written by hand or by an earlier push.
    """

    root: pathlib.Path
    class_name: str
    library: str
    is_pipeline: bool
    components: tuple[Component, ...]
    packed: tuple[PackedModel, ...]
    files: Mapping[str, pathlib.Path]
    card: pathlib.Path | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per converted weight of all packed models."""
        specs = {f"{part.name}.{name}": spec for part in self.packed for name, spec in part.layout.layers.items()}
        return bits_per_weight(specs)

    @property
    def ternary_layers(self) -> int:
        """Ternary layers of all packed models."""
        return sum(isinstance(spec, TernarySpec) for part in self.packed for spec in part.layout.layers.values())

    @property
    def format_version(self) -> int:
        """Of the packed format."""
        return max(part.layout.format_version for part in self.packed)

    @property
    def weights_sha256(self) -> str:
        """Hash of the packed models: layers and the checksums of all their tensors, however they are sharded."""
        content = {
            part.name: [
                {name: spec.to_json() for name, spec in sorted(part.layout.layers.items())},
                {name: part.layout.checksums.get(name) for name in sorted(part.tensors)},
            ]
            for part in self.packed
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
        library, class_name = _model_class(config)
        folders = {"": root}
    else:
        raise ValueError(
            f"{root} holds neither model_index.json (a pipeline) nor config.json (a model). Give a folder that "
            "save_pretrained wrote."
        )
    components: list[Component] = []
    packed: list[PackedModel] = []
    for name, path in folders.items():
        _check_complete(path)
        if not any(path.glob("*.safetensors")):
            continue
        components.extend(_inspect(path, name or class_name))
        model = _packed_model(name, path)
        if model is not None:
            packed.append(model)
    if not packed:
        raise ValueError(
            f"{root} holds no packed weights. Quantize or calibrate first: diffusers-ternary quantize {root} DST"
        )
    card = root / CARD
    return Source(
        root=root,
        class_name=class_name,
        library=library,
        is_pipeline=index is not None,
        components=tuple(components),
        packed=tuple(packed),
        files=dict(_files(root)),
        card=card if card.is_file() else None,
    )


def _inspect(folder: pathlib.Path, name: str) -> Iterator[Component]:
    own = folder.resolve().name
    for part in inspect_path(folder):
        # It also looks into subfolders, where a dequantized copy may be. "NAME (FILE)": several checkpoints.
        base, _, variant = part.name.partition(" (")
        if base == own:
            yield dataclasses.replace(part, name=f"{name} ({variant}" if variant else name)


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


def _model_class(config: Mapping[str, Any]) -> tuple[str, str]:
    if "_class_name" in config:
        return "diffusers", str(config["_class_name"])
    names = config.get("architectures")
    return "transformers", str(names[0]) if isinstance(names, list) and names else "AutoModel"


def _packed_model(name: str, folder: pathlib.Path) -> PackedModel | None:
    config = read_json(folder / "config.json") or {}
    method = quant_method(config, source=folder)
    layout, tensors = read_headers(default_files(folder, config))
    if layout is None and method == QUANT_METHOD:
        raise ValueError(
            f"{folder / 'config.json'} declares {QUANT_METHOD}, but the weights beside it are not packed. Restore the "
            "packed weights, or delete quantization_config from config.json."
        )
    if layout is None:
        return None
    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} holds packed weights, but its config.json has no quantization_config, so nobody could load "
            "them. Restore the config.json that was saved with them."
        )
    check_headers(layout, tensors, source=str(folder))
    check_values(layout, tensors)
    library, class_name = _model_class(config)
    return PackedModel(name, class_name, library, folder, layout, tensors)


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
