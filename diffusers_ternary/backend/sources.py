# SPDX-License-Identifier: Apache-2.0
"""Loads what a path or Hub id names: asks the Hub, checks what it is told, and calls the hosts.

What a local folder says of itself is read in `folder.py`.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HUB
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..files import read_json
from .checkpoint import read_headers
from .config import TernaryConfig
from .folder import (
    check_pipeline,
    default_files,
    explained_loading,
    has_default_files,
    model_class,
    pipeline_parts,
    quant_method,
)
from .foreign import check_float_checkpoint


_CONFIGS = ("model_index.json", "config.json")


def load_quantized(
    source: str, config: TernaryConfig, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> Any:
    """Loads a float pipeline, diffusers model or transformers model, quantizing on the fly.

    Args:
        source (`str`): local folder or Hub id.
        config ([`TernaryConfig`]): how to quantize.
        dtype (`torch.dtype`, *optional*): of what is not converted.
        variant (`str`, *optional*): of the source's files.

    Raises:
        ValueError: if `source` holds no pipeline and no model, or is quantized already.
    """
    import diffusers

    index = read_source_json(source, "model_index.json")
    if index is not None:
        for name in selected_components(index, config, source=source):
            _refuse_quantized(read_source_json(source, f"{name}/config.json"), f"{source}/{name}")
        check_pipeline(index, source=source)
        with explained_loading(source):
            return diffusers.DiffusionPipeline.from_pretrained(
                source, quantization_config=config, dtype=dtype, variant=variant
            )
    model = read_source_json(source, "config.json")
    if model is None:
        raise ValueError(
            f"{source} holds neither model_index.json (a pipeline) nor config.json (a model). Give a folder that "
            "save_pretrained wrote, or a Hub id."
        )
    _refuse_quantized(model, source)
    cls = model_class(model, source=source)
    with explained_loading(source):
        return cls.from_pretrained(source, quantization_config=config, dtype=dtype, variant=variant)


def selected_components(
    index: Mapping[str, Any], config: TernaryConfig, *, source: str | os.PathLike[str]
) -> list[str]:
    """The components of a pipeline that a config chooses.

    Args:
        index (`Mapping`): content of `model_index.json`.
        config ([`TernaryConfig`]): its `components`; without any, those that denoise.
        source (`str` or `PathLike`): the pipeline, for messages.

    Raises:
        ValueError: if there is no such component.
    """
    known = list(pipeline_parts(index, source=source))
    missing = [name for name in config.components or [] if name not in known]
    selected = [name for name in known if config.selects(name)]
    if missing or not selected:
        raise ValueError(
            f"{source} has no component {', '.join(missing) or 'that denoises'}. Choose from {', '.join(known)}."
        )
    return selected


def check_weights(source: str, parts: Iterable[str]) -> None:
    """Checks that a host loads the weights of models as what they are, if it is not told to quantize them.

    diffusers and transformers take 8-bit floats that have scales beside them for the weights, and leave the scales
    out with a warning at most.

    Args:
        source (`str`): local folder or Hub id whose files are in the cache.
        parts (`Iterable[str]`): folders of models in it; `""` for itself.

    Raises:
        ValueError: names the tensor.
    """
    try:
        root = pathlib.Path(source if os.path.isdir(source) else snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return
    for part in parts:
        folder = root / part
        config = read_json(folder / "config.json")
        if config is None or not has_default_files(folder, config):
            continue
        if quant_method(config, source=folder) is not None:  # whose quantizer knows the scales
            continue
        _, tensors = read_headers(default_files(folder, config))
        scales = check_float_checkpoint(tensors, source=str(folder)).scales
        if scales:
            raise ValueError(
                f"{folder} holds 8-bit floats with scales ({next(iter(scales))}), which diffusers would load without "
                "the scales. Start from the float weights; `diffusers-ternary quantize` reads the scales."
            )


def read_source_json(source: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a local folder or a Hub repository; `None` if it has no such file.

    Raises:
        ValueError: if there is neither such a folder nor such a repository, or the file is damaged.
    """
    if os.path.isdir(source):
        return read_json(pathlib.Path(source) / name)
    try:
        return read_json(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:  # the Hub was not asked, or could not be reached
        if any(isinstance(try_to_load_from_cache(source, known), str) for known in _CONFIGS):
            return None
        raise source_error(source, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise source_error(source, error) from error


def source_error(source: str | os.PathLike[str], error: Exception) -> ValueError:
    """Why a source that is not a local folder cannot be had from the Hub either, in one sentence."""
    place = os.fspath(source)
    if isinstance(error, HFValidationError):
        reason = "and no Hub id (owner/name) either. Check how it is written."
    elif isinstance(error, GatedRepoError):
        reason = f"and the Hub gives it only to those who were granted access: ask for it at {HUB}/{place}."
    elif isinstance(error, RepositoryNotFoundError):
        reason = "and the Hub has no such repository, or shows it to others only: check the name, or `hf auth login`."
    elif isinstance(error, HfHubHTTPError):
        reason = f"and the Hub does not give it: {str(error).splitlines()[0]}"
    else:
        reason = "it is not in the cache, and the Hub cannot be reached. Check the name and the connection."
    return ValueError(f"{place} is not a local folder, {reason}")


def _refuse_quantized(config: dict[str, Any] | None, source: str) -> None:
    method = quant_method(config or {}, source=source)
    if method is not None:
        raise ValueError(f"{source} is quantized already ({method}). Start from its float weights.")
