# SPDX-License-Identifier: Apache-2.0
"""Every name of another library that is not part of its documented API, in one place.

Each has a canary in `integration_tests/backend/test_compat.py` (those of LoRA: `test_compat.py`), which fails
readably when a new version moves it.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfigMixin
from huggingface_hub.errors import HTTPError as HubTransportError
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from .compat_offload import without_group_offloading


__all__ = [
    "FUSED_PROJECTIONS",
    "ConversionOps",
    "DiffusersConfigMixin",
    "DiffusersQuantizer",
    "HfQuantizer",
    "HubTransportError",
    "TransformersConfigMixin",
    "WeightConverter",
    "drop_unsaved",
    "forget_weight_conversions",
    "ignore_unexpected",
    "keep_in_fp32_names",
    "patch_flux_expansion",
    "patch_lora_mixin",
    "patch_modular_loading",
    "refuse_unknown_components",
    "update_config",
    "wrap_fuse_projections",
]


def update_config(model: Any, *, drop: tuple[str, ...] = (), **entries: Any) -> None:
    """Sets and removes entries of the frozen config of a diffusers model.

    Other than with `register_to_config`, attributes that diffusers set on the config without an entry stay:
    `load_ip_adapter` notes there that the model takes pictures.
    """
    old = model.config
    kept = {name: value for name, value in old.items() if name not in drop}
    new = FrozenDict({**kept, **entries})
    for name, value in vars(old).items():
        if name not in entries and name not in drop and (name not in kept or value is not kept[name]):
            setattr(new, name, value)
    model._internal_dict = new


def keep_in_fp32_names(model: Any) -> list[str]:
    """Components of parameter names that a diffusers or transformers model wants in float32."""
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        value = getattr(model, attribute, None) or []
        names.extend([value] if isinstance(value, str) else value)
    return names


def forget_weight_conversions(model: Any) -> None:
    """Makes transformers save the state dict as it is, instead of reverting the renamings of an older checkpoint."""
    model._weight_conversions = []


def drop_unsaved(state_dict: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` of a transformers model stores of a state dict: tied weights once, and nothing ignored.

    `state_dict` is left as it is.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    return remove_tied_weights_from_state_dict(
        {name: tensor for name, tensor in state_dict.items() if name not in ignored}, model
    )


def ignore_unexpected(model: Any, names: Iterable[str]) -> None:
    """Keeps transformers from reporting tensors of a checkpoint as unexpected."""
    patterns = {f"(^|\\.){re.escape(name)}$" for name in names}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def patch_flux_expansion(is_packed: Callable[[Any], bool]) -> None:
    """Teaches Flux's LoRA loader the shape and the float weight of packed layers.

    It knows quantized weights by class name, takes a packed weight's shape for the layer's, and would "expand" every
    packed layer. Imports `diffusers.loaders.lora_pipeline`.

    Args:
        is_packed (`Callable`): whether a module has `in_features`, `out_features` and `dequantize(dtype)` of ours.
    """
    from diffusers.loaders import lora_pipeline

    mixin = lora_pipeline.FluxLoraLoaderMixin
    shape_of = mixin._calculate_module_shape
    weight_of = lora_pipeline._maybe_dequantize_weight_for_expanded_lora
    if hasattr(shape_of, "__wrapped__"):
        return

    @functools.wraps(shape_of)
    def calculate_module_shape(
        model: Any, base_module: Any = None, base_weight_param_name: str | None = None
    ) -> torch.Size:
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if is_packed(module):
            return torch.Size((module.out_features, module.in_features))
        return shape_of(model, base_module, base_weight_param_name)

    @functools.wraps(weight_of)
    def dequantize_weight(model: Any, module: Any) -> torch.Tensor:
        return module.dequantize(model.dtype) if is_packed(module) else weight_of(model, module)

    expand = mixin._maybe_expand_lora_state_dict.__func__

    @functools.wraps(expand)
    def expand_lora_state_dict(cls: type, transformer: Any, lora_state_dict: dict[str, Any]) -> dict[str, Any]:
        # What is narrower than the layer is padded with zeros here: the original takes the width of the codes.
        for name, module in transformer.named_modules():
            base = getattr(module, "base_layer", module)
            key = f"{cls.transformer_name}.{name}.lora_A.weight"  # type: ignore[attr-defined]
            if key in lora_state_dict and is_packed(base) and lora_state_dict[key].shape[1] < base.in_features:
                missing = base.in_features - lora_state_dict[key].shape[1]
                lora_state_dict[key] = torch.nn.functional.pad(lora_state_dict[key], (0, missing))
        return cast(dict[str, Any], expand(cls, transformer, lora_state_dict))

    mixin._maybe_expand_lora_state_dict = classmethod(expand_lora_state_dict)
    mixin._calculate_module_shape = staticmethod(calculate_module_shape)
    lora_pipeline._maybe_dequantize_weight_for_expanded_lora = dequantize_weight


def patch_lora_mixin(is_packed: Callable[[Any], bool]) -> None:
    """Makes `fuse_lora` and `unfuse_lora` of diffusers' models lift group offloading where there are packed layers.

    They add and remove tensors, so offloading has to look at the model again (as diffusers itself does after
    `delete_adapters` and `unload_lora`); and they need the weights, which may be on disk. Imports
    `diffusers.loaders.peft`.

    Args:
        is_packed (`Callable`): whether a model has packed layers of ours.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    if hasattr(PeftAdapterMixin.fuse_lora, "__wrapped__"):
        return

    def in_memory(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            with without_group_offloading(self) if is_packed(self) else contextlib.nullcontext():
                return method(self, *args, **kwargs)

        return wrapper

    PeftAdapterMixin.fuse_lora = in_memory(PeftAdapterMixin.fuse_lora)
    PeftAdapterMixin.unfuse_lora = in_memory(PeftAdapterMixin.unfuse_lora)


# What diffusers' `fuse_projections` makes of an attention module's layers.
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def wrap_fuse_projections(cls: type, wrapper: Callable[[Any, Callable[[], None]], None]) -> None:
    """Makes `fuse_projections` of an attention class, wherever it has it from, call `wrapper(module, original)`."""
    owner = next(base for base in cls.__mro__ if "fuse_projections" in vars(base))
    original = vars(owner)["fuse_projections"]
    if hasattr(original, "__wrapped__") and getattr(original, "wrapper", None) is wrapper:
        return

    @functools.wraps(original)
    def fuse_projections(self: Any, *args: Any, **kwargs: Any) -> None:
        wrapper(self, lambda: original(self, *args, **kwargs))

    fuse_projections.wrapper = wrapper  # type: ignore[attr-defined]
    owner.fuse_projections = fuse_projections  # type: ignore[attr-defined]


def refuse_unknown_components(config_class: type) -> None:
    """Makes the pipeline loader raise where it only warns: at components of a `config_class` that a pipeline lacks."""
    from diffusers.pipelines import pipeline_utils  # not at import: it loads half of diffusers

    original = pipeline_utils._maybe_warn_for_wrong_component_in_quant_config
    if getattr(original, "config_class", None) is config_class:
        return

    @functools.wraps(original)
    def check(pipe_init_dict: dict[str, Any], quant_config: Any) -> None:
        if isinstance(quant_config, config_class):
            wanted = getattr(quant_config, "components_to_quantize", None) or []
            missing = [name for name in wanted if name not in pipe_init_dict]
            if missing:
                raise ValueError(
                    f"The pipeline has no component {', '.join(missing)} to quantize. Choose from "
                    f"{', '.join(pipe_init_dict)} with {config_class.__name__}(components=[...])."
                )
        original(pipe_init_dict, quant_config)

    check.config_class = config_class  # type: ignore[attr-defined]
    pipeline_utils._maybe_warn_for_wrong_component_in_quant_config = check


def patch_modular_loading(config_class: type) -> None:
    """Makes `ModularPipeline.load_components(quantization_config=config)` ask the config about each component.

    It hands one config to every component, so text encoders would be quantized, and an autoencoder without a layer to
    quantize stays `None`. The loader of other pipelines asks the config. A dictionary by component decides alone.
    """
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

    original = ModularPipeline.load_components
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_components(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("quantization_config")
        if isinstance(config, config_class):
            resolved = {name: config._resolve_quant_config(module_name=name) for name in self._component_specs}  # type: ignore[attr-defined]
            kwargs["quantization_config"] = {name: own for name, own in resolved.items() if own is not None}
        original(self, *args, **kwargs)

    ModularPipeline.load_components = load_components
