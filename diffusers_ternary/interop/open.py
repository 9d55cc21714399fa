# SPDX-License-Identifier: Apache-2.0
"""Finds out what format a path is in and opens it; headers only."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ..config import TernaryConfig
from ..files import read_json
from .clark import is_clark, read_clark
from .source import ForeignModel
from .tensor_files import SafetensorsFiles, StateDictFile
from .two_bit import find_state_dict, is_two_bit, read_two_bit


_INDEX = ".safetensors.index.json"


def open_foreign(
    path: pathlib.Path, *, config: pathlib.Path | None = None, variant: str | None = None
) -> ForeignModel:
    """Opens a model in any of the formats that `convert` reads.

    Args:
        path (`Path`): a model folder or a file.
        config (`Path`, *optional*): config.json, or its folder, for formats without one.
        variant (`str`, *optional*): of the files in a folder.

    Raises:
        ValueError: if it is none of them, or damaged.
        FileNotFoundError: if `path` or `config` does not exist.
    """
    given = None if config is None else _given_config(config)
    if path.is_dir():
        return _open_folder(path, given, variant)
    if path.suffix == ".gguf":
        from .gguf_import import read_gguf

        return read_gguf(path, given)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is in no format that is read here: folders of diffusers and transformers, Clark packs "
            "(.safetensors), gemlite and HQQ state dicts in their folder, GGUF (.gguf)."
        )
    files = SafetensorsFiles([path])
    own = read_json(path.parent / "config.json")
    if is_clark(files.names()):
        return read_clark(path, given or own)
    if given is None and own is None:
        raise ValueError(
            f"{path} is an ordinary safetensors file. Give the folder it lies in, with its config.json, or the "
            "config.json (--config)."
        )
    return _unpacked(files, given or own or {})


def pipeline_components(root: pathlib.Path, components: Sequence[str] | None) -> list[str]:
    """Components of a pipeline folder to convert.

    Raises:
        ValueError: if it has no such component.
    """
    index = read_json(root / "model_index.json") or {}
    known = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    config = TernaryConfig(components=components)
    missing = [name for name in components or [] if name not in known]
    selected = [name for name in known if config.selects(name)]
    if missing or not selected:
        raise ValueError(
            f"{root} has no component {', '.join(missing) or 'that denoises'}. Choose from {', '.join(known)}."
        )
    return selected


def _given_config(path: pathlib.Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    content = read_json(file)
    if content is None:
        raise FileNotFoundError(f"{file} does not exist. Give the config.json of the model, or the folder it is in.")
    return content


def _open_folder(folder: pathlib.Path, given: dict[str, Any] | None, variant: str | None) -> ForeignModel:
    config = given or read_json(folder / "config.json")
    if config is None:
        raise ValueError(
            f"{folder} holds neither model_index.json (a pipeline) nor config.json (a model). Give a folder that "
            "save_pretrained wrote, or a file."
        )
    # "hqq" and "gemlite" configs name the backend of the state dict that is about to be read.
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "hqq", "gemlite"):
        raise ValueError(f"{folder} is quantized already ({method}). convert reads unpacked weights and 2-bit packs.")
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    state_dict = find_state_dict(folder)
    if state_dict is not None:
        return read_two_bit(StateDictFile(state_dict), config, weights_name=_weights_name(config))
    files = SafetensorsFiles(_weight_files(folder, _weights_name(config), variant))
    if is_clark(files.names()):
        raise ValueError(f"{folder} holds a Clark pack. Give the file itself.")
    if is_two_bit(files.names()):
        return read_two_bit(files, config, weights_name=_weights_name(config))
    return _unpacked(files, config)


def _unpacked(files: SafetensorsFiles, config: dict[str, Any]) -> ForeignModel:
    names = files.names()
    shapes = {name: files.shape(name) for name in names}
    return ForeignModel(
        "unpacked weights",
        config,
        shapes,
        lambda: ((name, files.read(name)) for name in names),
        _weights_name(config),
    )


def _weights_name(config: dict[str, Any]) -> str:
    return "diffusion_pytorch_model" if "_class_name" in config else "model"


def _weight_files(folder: pathlib.Path, name: str, variant: str | None) -> list[pathlib.Path]:
    """The safetensors files that the host library would read: those of an index first, else the single file."""
    name = name if variant is None else f"{name}.{variant}"
    index_name = f"{name}{_INDEX}"
    if variant is not None:  # diffusion_pytorch_model.safetensors.index.fp16.json
        index_name = f"{name.removesuffix('.' + variant)}.safetensors.index.{variant}.json"
    index = read_json(folder / index_name)
    if index is not None:
        files = [folder / file for file in sorted(set(index.get("weight_map", {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"{folder / index_name} lists {', '.join(missing) or 'no files'}, which is missing.")
        return files
    file = folder / f"{name}.safetensors"
    if file.is_file():
        return [file]
    found = sorted(entry.name for entry in folder.glob("*.safetensors"))
    raise ValueError(
        f"{folder} has no {file.name} ({', '.join(found) or 'no safetensors files at all'}). Choose a --variant, or "
        "save the model as safetensors first."
    )
