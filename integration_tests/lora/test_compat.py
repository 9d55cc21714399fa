# SPDX-License-Identifier: Apache-2.0
"""Canaries: what adapters on packed layers rely on in PEFT and in diffusers' LoRA loaders.

A failure here says which upgrade broke what, before anything else fails in a way that is hard to read.
"""

import inspect

import diffusers
import peft
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.loaders import lora_pipeline
from diffusers.loaders import peft as lora_mixin
from diffusers.models import modeling_utils
from peft.tuners import tuners_utils
from peft.tuners.lora import dora, layer, model, variants
from peft.utils import hotswap, integrations, quantization_utils

from diffusers_ternary.layers import QuantizedLayer
from diffusers_ternary.lora import compat, layers


VERSIONS = f"(peft {peft.__version__}, diffusers {diffusers.__version__})"


def source(what: object) -> str:
    return inspect.getsource(inspect.unwrap(what) if callable(what) else what)


def test_every_name_of_compat_is_there():
    for name in compat.__all__:
        assert getattr(compat, name, None) is not None, f"compat.{name} is gone {VERSIONS}"


class TestPeft:
    def test_custom_modules_are_looked_at_first(self):
        text = source(model.LoraModel._create_new_module)
        assert "_custom_modules" in text, f"LoRA has no custom modules any more {VERSIONS}"
        assert text.index("_custom_modules") < text.index("dispatch_default")
        assert "custom_cls(target, adapter_name, config=config, **kwargs)" in text, f"called otherwise {VERSIONS}"
        config = peft.LoraConfig(target_modules=["x"])
        assert layers.TernaryLoraLinear in config._custom_modules.values(), f"not registered {VERSIONS}"

    @pytest.mark.parametrize("tuner", [compat.LoHaModel, compat.LoKrModel])
    def test_lycoris_takes_the_first_class_that_fits(self, tuner):
        assert "layers_mapping.items()" in source(tuner._create_new_module), f"found otherwise {VERSIONS}"
        classes = list(tuner.layers_mapping)
        assert classes.index(torch.nn.Linear) > 0
        assert issubclass(classes[0], QuantizedLayer), f"ours come too late {VERSIONS}"

    def test_dequantize_is_called_where_the_float_weight_is_needed(self):
        text = source(integrations.dequantize_module_weight)
        mark = f'hasattr(module, "{compat.DEQUANTIZE_MARK}")'
        assert mark in text, f"the mark of dequantizable layers is another one {VERSIONS}"
        assert "module.dequantize()" in text
        for user in (dora.DoraLinearLayer.forward, dora.DoraLinearLayer.update_layer):
            assert "dequantize_module_weight(base_layer)" in source(user), f"DoRA reads the weight itself {VERSIONS}"

    @pytest.mark.parametrize(
        ("cls", "name", "parameters"),
        [
            (layer.LoraLayer, "update_layer", ["self", "adapter_name", "r", "lora_alpha", "config", "kwargs"]),
            (layer.Linear, "merge", ["self", "safe_merge", "adapter_names"]),
            (layer.Linear, "unmerge", ["self"]),
            (layer.Linear, "get_delta_weight", ["self", "adapter"]),
            (layer.LoraLayer, "mica_init", ["self", "adapter_name"]),
            (layer.LoraLayer, "orthogonal_init", ["self", "adapter_name"]),
            (layer.Conv2d, "update_layer", ["self", "adapter_name", "r", "lora_alpha", "config", "kwargs"]),
            (layer.Conv2d, "get_delta_weight", ["self", "adapter"]),
            (tuners_utils.BaseTunerLayer, "get_base_layer", ["self"]),
            (tuners_utils.BaseTunerLayer, "_get_base_layer_device_and_dtype", ["self", "base_layer"]),
            (tuners_utils.BaseTunerLayer, "_get_available_adapters", ["self"]),
            (compat.LoHaLinear, "get_delta_weight", ["self", "adapter_name", "apply_rank_dropout"]),
            (compat.LoKrLinear, "get_delta_weight", ["self", "adapter_name", "apply_rank_dropout"]),
        ],
    )
    def test_methods_that_ours_override(self, cls, name, parameters):
        method = getattr(cls, name, None)
        assert method is not None, f"{cls.__name__}.{name} is gone {VERSIONS}"
        found = list(inspect.signature(method).parameters)
        assert found == parameters, f"{cls.__name__}.{name} takes {found} {VERSIONS}"

    def test_adapters_go_to_the_dtype_that_the_layer_names(self):
        text = source(tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer)
        assert "_get_base_layer_device_and_dtype" in text, f"asked otherwise {VERSIONS}"

    def test_unloading_asks_the_layer(self):
        text = source(tuners_utils.BaseTuner._unload_and_optionally_merge)
        assert "unload_and_optionally_merge_module(" in text, f"layers are not asked any more {VERSIONS}"
        assert "merge=merge, safe_merge=safe_merge, adapter_names=adapter_names" in text

    def test_every_initialization_is_known(self):
        """A new one may change the base weight: decide whether ours refuse it."""
        known = {"pissa", "corda", "olora", "mica", "loftq", "eva", "orthogonal", "lora_ga", "gaussian"}
        text = source(layer.LoraLayer.update_layer) + source(layer.LoraLayer.reset_lora_parameters)
        for name in known:
            assert f'"{name}"' in text, f"{name} is gone {VERSIONS}"
        inits = {name.removesuffix("_init") for name in vars(layer.LoraLayer) if name.endswith("_init")}
        assert inits <= {*layers._INITS_THAT_CHANGE_THE_BASE, "mica", "orthogonal"}, f"{sorted(inits)} {VERSIONS}"

    def test_variants(self):
        assert ("use_dora",) in layer.Linear.lora_variants.fget(object())
        parameters = list(inspect.signature(variants.DoraLinearVariant.merge_safe).parameters)
        assert parameters == ["module", "active_adapter", "orig_weight"], f"{parameters} {VERSIONS}"
        assert "base_layer.weight" in source(dora._DoraConvNdLayer.forward), (
            f"DoRA of convolutions dequantizes now: TernaryLoraConv2d.forward can go {VERSIONS}"
        )
        assert "self._kernel_dim = base_layer.weight.dim()" in source(layer._ConvNd.__init__)

    def test_injection_goes_through_one_method(self):
        text = source(tuners_utils.BaseTuner.inject_adapter)
        assert "self._create_and_replace(" in text, f"layers are replaced otherwise {VERSIONS}"
        parameters = list(inspect.signature(tuners_utils.BaseTuner._create_and_replace).parameters)
        assert parameters[:4] == ["self", "peft_config", "adapter_name", "target"], f"{parameters} {VERSIONS}"

    def test_other_methods_read_the_weight_through_the_backend(self):
        """Theirs are the layers that other_methods.py makes work on packed bases."""
        backend = quantization_utils.QuantizationBackend
        assert list(inspect.signature(backend.get_base_weight).parameters) == ["self", "base_layer"]
        assert list(inspect.signature(backend.set_base_weight).parameters) == ["self", "peft_layer", "weight_data"]
        base = tuners_utils.BaseTunerLayer
        assert "self.quantization_backend.get_base_weight(self.get_base_layer())" in source(base.get_base_weight)
        assert base.quantization_backend is None, f"layers know their backend otherwise {VERSIONS}"
        for method in (
            compat.BOFTConv2d.forward,
            compat.MissLinear.forward,
            compat.ShiraLinear.forward,
        ):
            assert "self.get_base_weight()" in source(method), f"{method.__qualname__} reads otherwise {VERSIONS}"
        text = source(compat.IA3Conv2d.forward)
        assert ".to(self.get_base_layer().weight.dtype)" in text, f"PackedIA3Conv2d.forward can go {VERSIONS}"
        assert "self._kernel_dim = base_layer.weight.dim()" in source(compat.IA3Conv2d.__mro__[1].__init__)

    def test_the_dtype_of_new_adapters_is_asked_of_two_attributes(self):
        text = source(tuners_utils.BaseTunerLayer._get_base_layer_device_and_dtype)
        assert '("weight", "qweight")' in text, f"asked otherwise {VERSIONS}"
        assert "base_layer.compute_dtype" in text

    def test_modules_to_save_copies_the_original_module(self):
        text = source(compat.ModulesToSaveWrapper.update)
        assert "copy.deepcopy(self.original_module)" in text, f"copied otherwise {VERSIONS}"

    def test_parameters_are_counted_in_one_method(self):
        text = source(peft.PeftModel.print_trainable_parameters)
        assert "self.get_nb_trainable_parameters()" in text, f"counted otherwise {VERSIONS}"
        assert "return trainable_params, all_param" in source(peft.PeftModel.get_nb_trainable_parameters)

    def test_hotswap_pads_ours(self):
        assert "isinstance(module, Linear)" in source(hotswap._pad_lora_weights), f"chosen otherwise {VERSIONS}"
        assert hotswap.Linear is compat.LoraLinear
        assert issubclass(layers.TernaryLoraLinear, hotswap.Linear)


class TestDiffusersLoaders:
    def test_flux_asks_for_shapes_and_weights(self):
        mixin = lora_pipeline.FluxLoraLoaderMixin
        shape = inspect.unwrap(mixin._calculate_module_shape)
        assert list(inspect.signature(shape).parameters) == ["model", "base_module", "base_weight_param_name"]
        expand = source(mixin._maybe_expand_transformer_param_shape_or_error_)
        assert "cls._calculate_module_shape(model=transformer, base_module=module)" in expand, f"moved {VERSIONS}"
        assert "_maybe_dequantize_weight_for_expanded_lora(transformer, module)" in expand, f"moved {VERSIONS}"
        assert hasattr(mixin._calculate_module_shape, "__wrapped__"), f"not patched {VERSIONS}"

    def test_flux_pads_narrow_adapters_by_the_width_of_the_parameter(self):
        text = source(lora_pipeline.FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__)
        assert "base_weight_param.shape[1]" in text, f"padded otherwise: expand_lora_state_dict can go {VERSIONS}"

    def test_no_other_loader_reads_packed_shapes(self):
        text = source(lora_pipeline).replace(source(lora_pipeline.FluxLoraLoaderMixin), "")
        assert ".weight.shape" not in text, f"another pipeline's LoRA loader looks at weights {VERSIONS}"

    def test_saving_an_adapter_still_needs_the_patch(self):
        assert "self.to(dtype=" in source(lora_mixin.PeftAdapterMixin.save_lora_adapter), (
            f"diffusers saves adapters of quantized models itself: patch_lora_mixin can go {VERSIONS}"
        )
        assert 'getattr(self, "is_quantized"' in source(modeling_utils.ModelMixin)

    def test_fusing_visits_the_layers_and_not_the_offloading(self):
        text = source(lora_mixin.PeftAdapterMixin.fuse_lora) + source(lora_mixin.PeftAdapterMixin.unfuse_lora)
        assert "_maybe_remove_and_reapply_group_offloading" not in text, f"diffusers does that itself now {VERSIONS}"
        assert list(inspect.signature(group_offloading._maybe_remove_and_reapply_group_offloading).parameters) == [
            "module"
        ]
