# SPDX-License-Identifier: Apache-2.0
"""The models of a float pipeline as their headers and configs describe them; no weights are read."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled
from torch import nn

from ..backend import StoredTensor, read_headers
from ..backend.components import encodes_text
from ..backend.config import DENOISER_COMPONENTS
from ..backend.folder import check_pipeline, default_files, pipeline_parts, quant_method, shard_names, weights_name
from ..backend.sources import read_source_json, source_error
from ..interop.empty_model import empty_model


_LARGEST_FILE = 10 * 10**9  # what diffusers writes, where nothing else is known


@dataclasses.dataclass(frozen=True)
class Part:
    """A model of a pipeline.

    Args:
        name (`str`): of the component.
        model (`nn.Module`): on the meta device.
        weights (`int`): values in its files.
        bytes (`int`): of its files.
        largest_file (`int`): bytes of the largest of them.
    """

    name: str
    model: nn.Module
    weights: int
    bytes: int
    largest_file: int

    @classmethod
    def of_model(cls, name: str, model: nn.Module) -> "Part":
        """A model on the meta device, as if it were stored in 16 bits."""
        weights = sum({id(each): each.numel() for each in model.parameters()}.values())
        return cls(name, model, weights, 2 * weights, min(2 * weights, _LARGEST_FILE))

    @property
    def denoises(self) -> bool:
        """Whether it is called at every step."""
        return DENOISER_COMPONENTS.fullmatch(self.name) is not None

    @property
    def encodes_text(self) -> bool:
        """Whether it reads the prompt."""
        return encodes_text(self.name)

    @property
    def decodes(self) -> bool:
        """Whether it makes pictures of latents."""
        return self.name.startswith(("vae", "vqvae", "movq"))


def pipeline_models(source: str) -> dict[str, Part]:
    """The models of a pipeline by component.

    Args:
        source (`str`): local folder, or Hub id: of it, configs are downloaded, and of weights that are not in the
            cache the headers.

    Raises:
        ValueError: if there is no such pipeline, it is quantized already, or a file is missing or damaged.
    """
    index = read_source_json(source, "model_index.json")
    if index is None:
        raise ValueError(
            f"{source} holds no model_index.json, so it is not a pipeline. Give the folder or Hub id of one."
        )
    check_pipeline(index, source=source)
    parts = {}
    for name in pipeline_parts(index, source=source):
        config = read_source_json(source, f"{name}/config.json")
        if config is None:  # a scheduler, a tokenizer
            continue
        place = f"{source}/{name}"
        if (method := quant_method(config, source=place)) is not None:
            raise ValueError(f"{place} is quantized already ({method}). Plan with the pipeline of its float weights.")
        stored = _headers(source, name, weights_name(config))
        files: dict[str, int] = {}
        for tensor in stored.values():
            files[tensor.file] = files.get(tensor.file, 0) + tensor.bytes
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        parts[name] = Part(
            name,
            empty_model(config, shapes, source=place),
            weights=sum(math.prod(shape) for shape in shapes.values()),
            bytes=sum(files.values()),
            largest_file=max(files.values()),
        )
    return parts


def _headers(source: str, name: str, weights: str) -> Mapping[str, StoredTensor]:
    """The tensors of a component, of headers alone."""
    if os.path.isdir(source):
        folder = pathlib.Path(source) / name
        config = read_source_json(source, f"{name}/config.json") or {}
        stored = read_headers(default_files(folder, config))[1]
    else:
        index = read_source_json(source, f"{name}/{weights}.safetensors.index.json")
        files = [f"{weights}.safetensors"] if index is None else shard_names(index, source=pathlib.Path(source) / name)
        stored = {key: tensor for file in files for key, tensor in _hub_header(source, f"{name}/{file}").items()}
    if not stored:
        raise ValueError(f"{source}/{name} holds no safetensors files. Save the pipeline as safetensors first.")
    return stored


def _hub_header(source: str, file: str) -> Mapping[str, StoredTensor]:
    """The tensors of a file on the Hub: of its header alone, if it is not in the cache."""
    cached = try_to_load_from_cache(source, file)
    if isinstance(cached, str):
        return read_headers([cached])[1]
    try:
        found = HfApi().parse_safetensors_file_metadata(source, file).tensors
    except EntryNotFoundError as error:
        raise ValueError(f"{source} has no {file}. Plan with a folder of safetensors files.") from error
    except NotASafetensorsRepoError as error:
        raise ValueError(f"{source}/{file} is not a safetensors file ({error}).") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise source_error(source, error) from error
    return {key: StoredTensor(file, tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}
