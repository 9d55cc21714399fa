# SPDX-License-Identifier: Apache-2.0
"""`fold_adapters`: makes a fine-tune of a float pipeline and its LoRA files, which is then calibrated or distilled."""

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..backend import packed_layers, read_headers
from ..files import file_sha256


logger = logging.getLogger(__name__)
# Parts of tensor names in files of LoRA, DoRA, LoHa and LoKr; the scripts of kohya have `lora` in every name.
_OF_ADAPTERS = ("lora", "lokr", "loha", "hada", "alpha", "dora", "diff")
_DEFAULT_FILE = "pytorch_lora_weights.safetensors"  # of save_lora_weights
# What the hosts raise for files that do not fit: their converters look names up and reshape.
_HOST_ERRORS = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class FoldedAdapter:
    """An adapter that has become part of a pipeline's weights.

    Args:
        name (`str`): of its file, or of the folder that it was given by.
        scale (`float`): that it was folded in with.
        sha256 (`str`): of its file.
    """

    name: str
    scale: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} at scale {self.scale:g}"


def folded_adapters(pipeline: DiffusionPipeline) -> tuple[FoldedAdapter, ...]:
    """The adapters that [`fold_adapters`] made part of this pipeline. Not saved with it: reports of runs name them."""
    return getattr(pipeline, "folded_adapters", ())


def check_adapters(adapters: Mapping[str | os.PathLike[str], float]) -> dict[pathlib.Path, FoldedAdapter]:
    """Looks at files and scales, before a model is loaded.

    Args:
        adapters (`Mapping`): see [`fold_adapters`].

    Returns:
        `dict[pathlib.Path, FoldedAdapter]`: by file, in their order.

    Raises:
        ValueError: for a missing or damaged file, one that is not an adapter, the same one twice, or a scale that is
            not a finite number.
    """
    found: dict[pathlib.Path, FoldedAdapter] = {}
    for given, scale in adapters.items():
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"The scale of {given} is {scale!r}, not a finite number such as 0.8.")
        path = pathlib.Path(given)
        file = path / _DEFAULT_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"{given} is not an adapter: there is no file {file}. Give a local .safetensors file; `hf download` "
                "gets one from the Hub."
            )
        _check_names(file)
        sha256 = file_sha256(file)
        twin = next((other for other, adapter in found.items() if adapter.sha256 == sha256), None)
        if twin is not None:
            raise ValueError(f"{given} is the same adapter as {twin}. Give it once, with the sum of the scales.")
        found[file] = FoldedAdapter(path.resolve().name, float(scale), sha256)
    return found


def fold_adapters(
    pipeline: DiffusionPipeline, adapters: Mapping[str | os.PathLike[str], float]
) -> tuple[FoldedAdapter, ...]:
    """Makes adapters part of the float weights of a pipeline, in place: W + scale B A, also of text encoders.

    Call it before [`calibrate`] or [`distill`], which then make one ternary model of the fine-tune, from prompts
    only. Their reports, and the model card that is written from these, name what was folded in. The files are
    loaded as `load_lora_weights` does, in any layout that diffusers reads.

    Args:
        pipeline (`DiffusionPipeline`): float, without adapters. Changed only if all adapters fit.
        adapters (`Mapping`): LoRA file, or folder that `save_lora_weights` wrote → scale.

    Returns:
        `tuple[FoldedAdapter, ...]`: what was folded in by this call.

    Raises:
        TypeError: if `pipeline` is not a pipeline.
        ValueError: for what [`check_adapters`] refuses, a file that is not an adapter of this model, and a pipeline
            that takes no LoRA, is quantized, offloaded, carries adapters, or had the same adapter folded in.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"fold_adapters takes a diffusers pipeline, got {type(pipeline).__name__}.")
    checked = check_adapters(adapters)
    host: Any = pipeline
    _check_pipeline(host)
    before = folded_adapters(pipeline)
    for adapter in checked.values():
        if adapter.sha256 in {earlier.sha256 for earlier in before}:
            raise ValueError(f"{adapter.name} is folded into this pipeline already. Load the pipeline again.")
    if not checked:
        return ()
    names = {f"folded_{number}": file for number, file in enumerate(checked)}
    try:
        for name, file in names.items():
            _load(host, name, file)
        host.set_adapters(list(names), [adapter.scale for adapter in checked.values()])
        components = host.get_list_adapters()
        for component in components:
            _check_weights(component, host.components[component])
        host.fuse_lora(components=list(components))
    finally:
        host.unload_lora_weights()  # what is fused stays in the weights
    host.folded_adapters = (*before, *checked.values())
    for adapter in checked.values():
        logger.info("Folded %s into %s.", adapter, ", ".join(components))
    return tuple(checked.values())


def _check_names(file: pathlib.Path) -> None:
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a safetensors file, and other kinds are not read. Convert it.")
    _, tensors = read_headers([file])
    others = [name for name in tensors if not any(part in name.lower() for part in _OF_ADAPTERS)]
    if len(others) == len(tensors):
        raise ValueError(f"{file} is not a LoRA: no tensor is named like one of an adapter, e.g. {others[:1]}.")
    if others:
        raise ValueError(
            f"{file} also holds whole weights ({others[0]}), as control LoRAs do, which cannot be folded in. Give "
            "adapters of low rank alone."
        )


def _check_pipeline(pipeline: Any) -> None:
    name = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{name} has no load_lora_weights, so diffusers knows no LoRA of it.")
    loaded = [adapter for adapters in pipeline.get_list_adapters().values() for adapter in adapters]
    if loaded:
        raise ValueError(
            f"The pipeline carries adapters already ({', '.join(sorted(set(loaded)))}). Take them off with "
            "unload_lora_weights(), and fold their files in."
        )


def _check_weights(component: str, model: nn.Module) -> None:
    if packed_layers(model):
        raise ValueError(
            f"The pipeline's {component} is packed. Start from the float weights; diffusers_ternary.merge_lora folds "
            "adapters into packed ones."
        )
    method = getattr(model, "quantization_method", None)
    if method is not None:
        raise ValueError(f"The pipeline's {component} is quantized ({method}). Start from the float weights.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"The pipeline's {component} has weights that are not in memory. Fold adapters in before offloading is "
            "enabled."
        )


def _load(pipeline: Any, name: str, file: pathlib.Path) -> None:
    try:
        pipeline.load_lora_weights(str(file), adapter_name=name)
    except _HOST_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be loaded as an adapter of {type(pipeline).__name__} ({reason}). Give one that was "
            "trained on this model."
        ) from error
    if all(name not in names for names in pipeline.get_list_adapters().values()):
        raise ValueError(
            f"{file} is not an adapter of {type(pipeline).__name__}: no tensor is named like one of its layers. Give "
            "one that was trained on this model."
        )
