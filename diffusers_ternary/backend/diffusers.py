# SPDX-License-Identifier: Apache-2.0
"""The quantizer that diffusers calls from `from_pretrained`, `from_single_file` and `save_pretrained`."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from torch import nn
from torch.utils._pytree import tree_map

from ..layers import Int8Layer, QuantizedLayer, read_records
from .checkpoint import (
    PackedCheckpoint,
    check_crc,
    check_headers,
    check_packed_as_declared,
    load_tensor,
    owner,
    read_headers,
    state_dict_to_file,
    to_memory,
)
from .compat import DiffusersQuantizer, update_config
from .config import RECOVER, TernaryConfig, TernaryMethod
from .dequantize import dequantize_layers
from .float8 import Float8Scales, find_float8_scales, headers_of, unscale_state_dict
from .foreign import refuse_gguf, refuse_quantized_headers
from .fused_projections import enable_fused_projections
from .host_models import prepare_diffusers
from .pack import NOT_TERNARY, PackingRecord, float_layer, pack_layer
from .parts import packed_parts
from .placeholders import insert_packed, insert_placeholders
from .placement import model_bytes, warm_up_factor
from .plan import plan_conversion
from .summary import packed_layers, summarize


logger = logging.getLogger(__name__)


class TernaryDiffusersQuantizer(DiffusersQuantizer):
    """Streams float checkpoints into packed layers, and packed ones to and from files.

    On the fly, each layer is a placeholder of its float shape on the meta device, and is packed the moment its weight
    arrives: memory never holds more than one shard and the packed model.

    Args:
        quantization_config ([`TernaryConfig`]): what to do.
        pre_quantized (`bool`): whether the model's own config asked for this quantizer.
    """

    use_keep_in_fp32_modules = True
    quantization_config: TernaryConfig

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint: PackedCheckpoint | None = None
        # Layers that were packed when the model was quantized; what is packed now, the model itself knows.
        self.once: frozenset[str] = frozenset()
        self.kept: dict[str, str] = {}
        # Of a float checkpoint whose headers were read.
        self.float8: Float8Scales | None = None
        # Parameters whose float values are packed while loading.
        self.to_pack: set[str] = set()
        self.packing = PackingRecord()
        # Of the bytes of the packed model, those that accelerate counts while it plans a device map.
        self.counted_share = 1.0
        self.warm_up_factor = 4
        self.dtype = torch.float32
        self.progress: Any = None
        self.input_hook: Any = None

    # --- before the weights -------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Rejects placements that would store float weights.

        Raises:
            ValueError: for disk offload while quantizing on the fly.
        """
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts layers on disk while quantizing on the fly, which would store them unquantized. "
                "Quantize and save_pretrained first, then load the packed folder with this device_map."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Without `torch_dtype`, the model is loaded in the config's compute dtype."""
        dtype = torch_dtype if torch_dtype is not None else self.quantization_config.torch_compute_dtype
        self.dtype = dtype or self.dtype
        return dtype

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
        layout, tensors = read_headers(checkpoint_files)
        source = os.path.dirname(os.fspath(checkpoint_files[0])) if checkpoint_files else "checkpoint"
        check_packed_as_declared(layout, declared=self.pre_quantized, source=source)
        if layout is None:
            refuse_quantized_headers(tensors, source=source)
            if not tensors:  # pickled files, which have no headers
                return loaded_keys
            self.float8 = find_float8_scales(tensors, lambda name: load_tensor(tensors[name], name), source=source)
            return [name for name in loaded_keys if name not in self.float8.extras]
        else:
            check_headers(layout, tensors, source=source)
            self.checkpoint = PackedCheckpoint(layout, tensors)
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.checkpoint is not None:
            insert_packed(
                model,
                self.checkpoint.layout.layers,
                self.checkpoint.scale_dtypes(),
                self.quantization_config,
                source=next(iter(self.checkpoint.tensors.values())).file,
            )
            self.warm_up_factor = warm_up_factor(model, self.quantization_config, self.dtype)
            return
        if state_dict is not None:
            # Only from_single_file hands over the weights here; it claims that every checkpoint is pre-quantized.
            self.pre_quantized = False
        plan = plan_conversion(model, self.quantization_config)
        insert_placeholders(model, plan, self.quantization_config)
        self.kept = plan.kept
        self.to_pack = {f"{name}.weight" for name in plan.kinds}
        self.warm_up_factor = warm_up_factor(model, self.quantization_config, self.dtype)
        self.progress = tqdm(total=len(plan.kinds), desc="Packing layers", leave=False)

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
            return _float_values(state_dict, self.float8, self.to_pack)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # checksums and conversions release the GIL
            return dict(zip(state_dict, pool.map(self.read_tensor, state_dict, state_dict.values()), strict=True))

    def read_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Checks one stored tensor and turns it into its memory layout; the result holds nothing of the file."""
        assert self.checkpoint is not None
        layout = self.checkpoint.layout
        source = self.checkpoint.tensors[name].file if name in self.checkpoint.tensors else "checkpoint"
        check_crc(name, tensor, layout, source=source)
        part = owner(name, layout.layers)
        if part is not None:
            layer, suffix = part
            converted = to_memory(name, suffix, tensor, layout.layers[layer], source=source)
            if converted.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                return converted
            tensor = converted
        return tensor.clone()  # out of the mapped file: one tensor that stays would keep the whole of it mapped

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
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedLayer)
        # The loader has cast param_value to the model's dtype already; the checkpoint's own precision is better.
        weight = param_value if state_dict is None else state_dict[param_name]
        weight = weight.to(target_device)
        if self.float8 is not None:
            weight = self.float8.weight(param_name, weight)
        if not pack_layer(module, weight, name=name, config=self.quantization_config, record=self.packing):
            model.set_submodule(name, float_layer(module, weight.to(param_value.dtype)))
            self.kept[name] = NOT_TERNARY
        self.progress.update()

    # --- after the weights --------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.progress is not None:
            self.progress.close()
            self.progress = None
        self.packing.report(model)
        for name, layer in packed_layers(model).items():
            if not layer.is_packed:
                raise ValueError(f"The checkpoint has no weight for {name}. Check that no shard is missing.")
        self.attach(model)
        logger.info("%s", summarize(model, self.kept))
        return model

    def attach(self, model: Any) -> None:
        """Marks `model` as quantized by this quantizer, and remembers what saving needs to know."""
        self.once = frozenset(packed_layers(model))
        self.checkpoint = None
        # What was loaded or made is packed now, whichever way it came.
        self.pre_quantized = True
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
        converted, layout = state_dict_to_file(state_dict, read_records(state_dict), once=self.once)
        return converted, layout.to_metadata()

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

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on packed models; the packed weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile(fullgraph=True)` works."""
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


def _float_values(state_dict: dict[str, Any], float8: Float8Scales | None, to_pack: set[str]) -> dict[str, Any]:
    """Tensors of a float checkpoint: those to pack as they are stored, all others in their values."""
    refuse_gguf(state_dict, source="the checkpoint")
    _refuse_packed_single_file(state_dict)
    if float8 is None:
        # from_single_file, before the names are those of the model; or files that have no headers.
        refuse_quantized_headers(headers_of(state_dict), source="the checkpoint")
        values = unscale_state_dict(state_dict, source="the checkpoint")
        return {name: value if name in to_pack else value.clone() for name, value in values.items()}
    # Kept tensors are copied out of the mapped file: one that stays would keep the whole of it mapped.
    return {
        name: tensor if name in to_pack else float8.weight(name, tensor).clone()
        for name, tensor in state_dict.items()
        if name not in float8.extras
    }


def _refuse_packed_single_file(state_dict: dict[str, Any]) -> None:
    for name, weight in state_dict.items():
        packed = getattr(weight, "dtype", None) == torch.uint8 and weight.dim() == 1
        if packed and f"{name}_scale" in state_dict:
            raise ValueError(
                f"{name} is packed already: from_single_file reads float checkpoints. Load packed models with "
                "from_pretrained(folder), from the folder that save_pretrained wrote."
            )
