# SPDX-License-Identifier: Apache-2.0
"""Finds out what format a path is in and opens it; headers only."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from ..backend.folder import explained_loading, quant_method, weight_files, weights_name
from ..backend.foreign import refuse_quantized_headers
from ..backend.method import QUANT_METHOD
from ..files import read_json
from .clark import is_clark, read_clark
from .foreign_model import ForeignModel, Item
from .mflux_import import is_mflux, read_mflux
from .tensor_files import SafetensorsFiles, StateDictFile
from .two_bit import find_state_dict, is_two_bit, read_two_bit


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
    with named_errors(path):
        model = _open(path, given, variant)
    return dataclasses.replace(model, items=lambda: _named_items(model, path))


def _open(path: pathlib.Path, given: dict[str, Any] | None, variant: str | None) -> ForeignModel:
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


@contextlib.contextmanager
def named_errors(path: pathlib.Path) -> Iterator[None]:
    """Makes every error of reading somebody's format one that names the file.

    Readers check what they know to go wrong; in files that were made to harm, anything else does.

    Raises:
        ValueError: instead of errors that say what went wrong inside, and not with what.
    """
    try:
        with explained_loading(path, own_reader=True):
            yield
    except (ValueError, TypeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _named_items(model: ForeignModel, path: pathlib.Path) -> Iterator[Item]:
    with named_errors(path):
        for name, tensor in model.items():
            # 8-bit floats know no such test.
            values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{path}: {name} holds NaN or Inf. The file is damaged: download it again.")
            yield name, tensor


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
    method = quant_method(config, source=folder)
    if method == QUANT_METHOD:
        raise ValueError(f"{folder} is packed already. To export it, say to what: to='gguf' or to='mflux'.")
    if method not in (None, "hqq", "gemlite"):
        raise ValueError(f"{folder} is quantized already ({method}). convert reads unpacked weights and 2-bit packs.")
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    if is_mflux(folder):
        return read_mflux(folder, config)
    state_dict = find_state_dict(folder)
    if state_dict is not None:
        return read_two_bit(StateDictFile(state_dict), config, weights_name=weights_name(config))
    files = SafetensorsFiles(weight_files(folder, weights_name(config), variant))
    if is_clark(files.names()):
        raise ValueError(f"{folder} holds a Clark pack. Give the file itself.")
    if is_two_bit(files.names()):
        return read_two_bit(files, config, weights_name=weights_name(config))
    return _unpacked(files, config)


def _unpacked(files: SafetensorsFiles, config: dict[str, Any]) -> ForeignModel:
    refuse_quantized_headers(files.stored, source=files.source)  # codes of others are not weights to keep
    names = files.names()
    shapes = {name: files.shape(name) for name in names}
    return ForeignModel(
        "unpacked weights",
        config,
        shapes,
        lambda: ((name, files.read(name)) for name in names),
        weights_name(config),
    )
