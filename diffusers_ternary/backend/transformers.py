# SPDX-License-Identifier: Apache-2.0
"""The quantizer that transformers calls for text encoders."""

import copy
from typing import Any

import torch

from ..format import FLOAT_NAMES
from ..layers import QuantizedLayer, TernaryLinear, read_records
from .checkpoint import check_values
from .compat import (
    ConversionOps,
    HfQuantizer,
    WeightConverter,
    drop_unsaved,
    forget_weight_conversions,
    ignore_unexpected,
)
from .config import TernaryConfig, TernaryMethod
from .dequantize import dequantize_layers
from .host_models import prepare_transformers
from .loading import ModelLoading
from .parts import give_own_config, packed_parts, renamed_for
from .sizes import bytes_per_weight
from .summary import packed_layers


_STORED = TernaryLinear.packed_names


class QuantizerOperation(ConversionOps):
    """A conversion that reports to the quantizer, which all copies share: the loader copies it for every tensor."""

    def __init__(self, quantizer: "TernaryTransformersQuantizer") -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizerOperation":
        return self


def _packed_parts(model: Any) -> list[Any]:
    from transformers import PreTrainedModel  # not at import: it loads half of transformers

    return packed_parts(model, PreTrainedModel)


def _mark_initialized(layer: Any) -> None:
    """transformers draws random values for parameters without this mark."""
    for name in _STORED:
        parameter = getattr(layer, name, None)
        if parameter is not None:
            parameter._is_hf_initialized = True


class PackOnLoad(QuantizerOperation):
    """Packs a float weight into its placeholder the moment it is read."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        """See `ConversionOps`; returns nothing because the layer takes the tensors itself."""
        name = kwargs["full_layer_name"].rpartition(".")[0]
        value = next(iter(input_dict.values()))
        weight = value[0] if isinstance(value, list) else value
        model, quantizer = kwargs["model"], self.quantizer
        layer = model.get_submodule(name)
        float8, stored_name = quantizer.float8, kwargs["source_patterns"][0]
        if float8.scales and stored_name not in quantizer.stored_names:
            quantizer.first_error = quantizer.first_error or ValueError(
                f"{stored_name} is merged of several tensors while loading, which is not done for 8-bit floats with "
                "scales. Load the float checkpoint of the model."
            )
        weight = float8.weight(stored_name, weight)
        if not isinstance(layer, QuantizedLayer):  # a layer that is kept
            return {kwargs["full_layer_name"]: weight.to(layer.weight.dtype)}
        try:
            layer = quantizer.pack(model, name, weight, dtype=layer.weight.dtype)
        except Exception as error:
            # The loader would bury it in a report of its own; it is raised when the loader is done.
            quantizer.first_error = quantizer.first_error or error
            layer.install_empty(torch.float16, weight.device)
        _mark_initialized(layer)
        kwargs["missing_keys"].discard(f"{name}.weight")
        return {}


class UnpackOnLoad(QuantizerOperation):
    """Turns stored tensors of packed layers into their memory layout; passes all others on."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        """See `ConversionOps`."""
        full_name = kwargs["full_layer_name"]
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        return {full_name: self.quantizer.read_tensor(full_name, tensor)}


class TernaryTransformersQuantizer(ModelLoading, HfQuantizer):
    """Streams float checkpoints into packed layers, and packed ones to and from files.

    Args:
        quantization_config ([`TernaryConfig`]): what to do.
        pre_quantized (`bool`): whether the model's own config asked for this quantizer.
    """

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # The first layer that could not be packed; raised after loading.
        self.first_error: Exception | None = None
        self.read: set[str] = set()

    # --- before the weights -------------------------------------------------------------------------------------

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Without a dtype, the model is loaded in the config's compute dtype."""
        return dtype if dtype is not None else self.quantization_config.torch_compute_dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self.read_checkpoint(checkpoint_files or [])
        if self.checkpoint is not None:
            # Before anything is loaded: the loader collects the errors of conversions and raises one of its own.
            check_values(self.checkpoint.layout, self.checkpoint.tensors)
            self.checkpoint = renamed_for(model, self.checkpoint)
        ignore_unexpected(model, self.float8.extras)
        self.insert_layers(model)
        for layer in packed_layers(model).values():
            if layer.is_packed:  # those that stay on disk are not loaded, and must not be drawn at random
                _mark_initialized(layer)
        return model

    # --- the weights --------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the float weight of a placeholder, or an 8-bit float that has a scale."""
        layer, _, name = param_name.rpartition(".")
        if name != "weight":
            return False
        module = model.get_submodule(layer)
        if isinstance(module, QuantizedLayer):
            return not module.is_packed
        # Only the conversion is told what the weight is called in the file.
        return bool(self.float8.scales) and module.weight.is_floating_point()

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element while a device map or an allocation is planned; of a placeholder, as it will be packed."""
        layer = model.get_submodule(param_name.rpartition(".")[0])
        if isinstance(layer, QuantizedLayer) and param is layer.weight and not layer.is_packed:
            return bytes_per_weight(layer, self.quantization_config)
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """Packs on the fly."""
        return PackOnLoad(self)

    def get_weight_conversions(self) -> list[Any]:
        """Turns stored tensors into their memory layout, one by one."""
        if not self.pre_quantized:
            return []
        return [WeightConverter([name], [name], [UnpackOnLoad(self)]) for name in _STORED]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Kept weights are cast with the model, stored tensors of packed layers never."""
        is_float = (
            param.get_dtype().startswith(("F", "BF")) if hasattr(param, "get_dtype") else param.is_floating_point()
        )
        stored = any(name in FLOAT_NAMES for name in getattr(converter, "source_patterns", ()))
        return dtype if is_float and not stored else None

    def read_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Turns one stored tensor into its memory layout."""
        assert self.checkpoint is not None
        self.read.add(name)
        return self.checkpoint.to_memory(name, tensor)

    # --- after the weights --------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.first_error is not None:
            raise self.first_error
        for name, layer in packed_layers(model).items():
            for suffix in layer.spec.file_tensors() if self.checkpoint is not None else ():
                if f"{name}.{suffix}" not in self.read:
                    raise ValueError(
                        f"The checkpoint has no tensor {name}.{suffix}, which the {type(layer).__name__} needs. "
                        "The file is incomplete: download it again, or write it again with diffusers-ternary."
                    )
        self.finish(model)
        return model

    def attach(self, model: Any) -> None:
        """Marks `model` as quantized by this quantizer."""
        super().attach(model)
        self.read = set()
        prepare_transformers()
        give_own_config(model)
        model.config.quantization_config = self.quantization_config
        for part in _packed_parts(model):  # each may be saved on its own
            # Files are written with the names of the modules, whatever names they were read under.
            forget_weight_conversions(part)
            part.hf_quantizer = self
            part.is_quantized = True
            part.quantization_method = TernaryMethod.DIFFUSERS_TERNARY

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Memory layout to file layout, called by `save_pretrained` of the model or of a model within it.

        Of a model with adapters of its own (`add_adapter`), transformers saves only these, in PEFT's layout.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # it takes the adapter out of the model itself
        if getattr(model.config, "quantization_config", None) is None:
            # A tower's config is a part of the whole model's, which says once for all that it is packed.
            model.config = copy.copy(model.config)
            model.config.quantization_config = self.quantization_config
        state_dict = model.state_dict()
        records = read_records(state_dict)
        return self.to_file(drop_unsaved(state_dict, model), records)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves the name of the dtype in the model's config.
        parts = _packed_parts(model)
        dequantize_layers(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for part in parts:
            if part is not model:
                self.remove_quantization_config(part)
        if getattr(model.config, "quantization_config", None) is None:  # a part of the model shared it, and removed it
            model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True
