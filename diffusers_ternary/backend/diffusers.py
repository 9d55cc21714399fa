# SPDX-License-Identifier: Apache-2.0
"""The quantizer that diffusers calls from `from_pretrained`, `from_single_file` and `save_pretrained`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..layers import Int8Layer, QuantizedLayer, read_records
from ..progress import Bar
from .checkpoint import check_crc
from .compat import DiffusersQuantizer, update_config
from .config import RECOVER, TernaryConfig, TernaryMethod
from .dequantize import dequantize_layers
from .float8 import headers_of, unscale_state_dict
from .foreign import refuse_gguf, refuse_quantized_headers
from .fused_projections import enable_fused_projections
from .host_models import prepare_diffusers
from .loading import ModelLoading
from .parts import packed_parts
from .sizes import model_bytes, warm_up_factor
from .summary import packed_layers


class TernaryDiffusersQuantizer(ModelLoading, DiffusersQuantizer):
    """Streams float checkpoints into packed layers, and packed ones to and from files.

    On the fly, each layer is a placeholder of its float shape on the meta device, and is packed the moment its weight
    arrives: memory never holds more than one shard and the packed model.

    Args:
        quantization_config ([`TernaryConfig`]): what to do.
        pre_quantized (`bool`): whether the model's own config asked for this quantizer.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Parameters whose float values are packed while loading.
        self.to_pack: set[str] = set()
        # Of the bytes of the packed model, those that accelerate counts while it plans a device map.
        self.counted_share = 1.0
        self.warm_up_factor = 4
        self.dtype = torch.float32
        self.progress: Any = None
        self.input_hook: Any = None

    # --- before the weights -------------------------------------------------------------------------------------

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Without `torch_dtype`, the model is loaded in the config's compute dtype, or in float32 as ever."""
        self.dtype = torch_dtype or self.quantization_config.torch_compute_dtype or self.dtype
        return self.dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, Any]:
        """What the weights of placeholders take in `device_map="auto"`: 2-bit codes, int8, or float.

        accelerate has no finer unit: `adjust_max_memory` makes up for the scales.
        """
        from accelerate.utils import CustomDtype, compute_module_sizes

        config = self.quantization_config
        special: dict[str, Any] = {}
        for name, layer in packed_layers(model).items():
            if not layer.is_packed and config.rounding != RECOVER:
                special[f"{name}.weight"] = torch.int8 if isinstance(layer, Int8Layer) else CustomDtype.INT2
        counted = compute_module_sizes(model, dtype=torch_dtype, special_dtypes=special)[""]
        self.counted_share = min(1.0, counted / max(1, model_bytes(model, config)))
        return special

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leaves the room of what `get_special_dtypes_update` cannot count: scales, multipliers, corrections."""
        return {device: int(limit * self.counted_share) for device, limit in max_memory.items()}

    def get_cuda_warm_up_factor(self) -> int:
        """The loader allocates "elements of the model" / this factor, in the model's dtype: no more than it needs."""
        return self.warm_up_factor

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The only hook that sees all shards before modules are swapped: reads and checks their headers."""
        self.read_checkpoint(checkpoint_files)
        return [name for name in loaded_keys if name not in self.float8.extras]

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if state_dict is not None:
            # Only from_single_file hands over the weights here; it claims that every checkpoint is pre-quantized.
            self.pre_quantized = False
        placeholders = self.insert_layers(model)
        self.to_pack = {f"{name}.weight" for name in placeholders}
        self.warm_up_factor = warm_up_factor(model, self.quantization_config, self.dtype)
        if placeholders:
            self.progress = Bar(None, "Packing layers", total=len(placeholders))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """A packed or to-be-packed layer without its tensors is an error, not a warning."""
        layers = packed_layers(model)
        for key in sorted(missing_keys):
            layer, _, name = key.rpartition(".")
            if layer in layers and name in layers[layer].packed_names:
                raise ValueError(
                    f"The checkpoint has no tensor {key}, which the {type(layers[layer]).__name__} needs. "
                    "Check that it belongs to this architecture and that no shard is missing."
                )
        return missing_keys

    # --- the weights --------------------------------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Turns the packed tensors of a shard into their memory layout, checking every tensor on the way."""
        if self.checkpoint is None:
            return self.float_values(state_dict)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # checksums and conversions release the GIL
            return dict(zip(state_dict, pool.map(self.read_tensor, state_dict, state_dict.values()), strict=True))

    def read_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Checks one stored tensor and turns it into its memory layout; the result holds nothing of the file."""
        assert self.checkpoint is not None
        check_crc(name, tensor, self.checkpoint.layout, source=self.checkpoint.file_of(name))
        converted = self.checkpoint.to_memory(name, tensor)
        if converted.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            return converted
        return converted.clone()  # out of the mapped file: one tensor that stays would keep the whole of it mapped

    def float_values(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Tensors of a float checkpoint: those to pack as they are stored, all others in their values."""
        refuse_gguf(state_dict, source="the checkpoint")
        _refuse_packed_single_file(state_dict)
        if not self.stored_names:
            # from_single_file, before the names are those of the model; or files that have no headers.
            refuse_quantized_headers(headers_of(state_dict), source="the checkpoint")
            values = unscale_state_dict(state_dict, source="the checkpoint")
        else:
            values = {
                name: tensor if name in self.to_pack else self.float8.weight(name, tensor)
                for name, tensor in state_dict.items()
                if name not in self.float8.extras
            }
        # Kept tensors are copied out of the mapped file: one that stays would keep the whole of it mapped.
        return {name: value if name in self.to_pack else value.clone() for name, value in values.items()}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether this is the float weight of a placeholder."""
        layer, _, name = param_name.rpartition(".")
        if self.pre_quantized or name != "weight":
            return False
        module = model.get_submodule(layer)
        return isinstance(module, QuantizedLayer) and not module.is_packed

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any] | None = None,
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Packs one layer on the device it will live on."""
        name = param_name.rpartition(".")[0]
        # The loader has cast param_value to the model's dtype already; the checkpoint's own precision is better.
        weight = param_value if state_dict is None else state_dict[param_name]
        weight = self.float8.weight(param_name, weight.to(target_device))
        self.pack(model, name, weight, dtype=param_value.dtype)
        self.progress.update()

    # --- after the weights --------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.progress is not None:
            self.progress.close()
            self.progress = None
        self.finish(model)
        return model

    def attach(self, model: Any) -> None:
        """Marks `model` as quantized by this quantizer, and remembers what saving needs to know."""
        super().attach(model)
        enable_fused_projections(model)
        prepare_diffusers()
        for part in _packed_parts(model):  # the networks of a MultiControlNetModel, which are saved one by one
            if part is not model and getattr(part, "hf_quantizer", None) is None:
                type(self)(self.quantization_config, pre_quantized=True).attach(part)
        if not hasattr(model, "register_to_config"):
            return  # a list of models, without a config or a file of its own
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = TernaryMethod.DIFFUSERS_TERNARY
        update_config(model, quantization_config=self.quantization_config)
        if self.input_hook is None and model.dtype == torch.float32:
            self.input_hook = model.register_forward_pre_hook(upcast_inputs, with_kwargs=True)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Memory layout to file layout, called by `save_pretrained`.

        Raises:
            ValueError: for pickle files, which have no metadata, and for models with adapters.
        """
        if not safe_serialization:
            raise ValueError("Packed weights are saved as safetensors only: leave safe_serialization=True.")
        return self.to_file(state_dict, read_records(state_dict))

    def _dequantize(self, model: Any) -> Any:
        for part in _packed_parts(model):
            if part is not model:
                part.dequantize()
        dequantize_layers(model)
        if self.input_hook is not None:
            self.input_hook.remove()
            self.input_hook = None
        model.quantization_method = None
        update_config(model, drop=("quantization_config", "_pre_quantization_dtype"))
        return model

    @property
    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True


def _packed_parts(model: nn.Module) -> list[Any]:
    from diffusers import ModelMixin  # not at import: it loads half of diffusers

    return packed_parts(model, ModelMixin)


def upcast_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: while a model is in float32, its 16-bit inputs become float32, which loses nothing.

    Without `torch_dtype`, transformers loads a text encoder in the dtype of its file and diffusers loads everything
    else in float32; a pipeline saved in 16 bits would then stop at the first linear layer with a dtype error.
    """

    if model.dtype != torch.float32:  # it was cast since
        return args, kwargs

    def upcast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            return value.float()
        return value

    return tree_map(upcast, args), tree_map(upcast, kwargs)


def _refuse_packed_single_file(state_dict: dict[str, Any]) -> None:
    for name, weight in state_dict.items():
        packed = getattr(weight, "dtype", None) == torch.uint8 and weight.dim() == 1
        if packed and f"{name}_scale" in state_dict:
            raise ValueError(
                f"{name} is packed already: from_single_file reads float checkpoints. Load packed models with "
                "from_pretrained(folder), from the folder that save_pretrained wrote."
            )
