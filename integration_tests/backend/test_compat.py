# SPDX-License-Identifier: Apache-2.0
"""Canaries: every name of another library that is not documented API, and what is relied on about it.

A failure here says which upgrade broke what, before anything else fails in a way that is hard to read.
"""

import importlib
import inspect
import re

import accelerate.utils
import diffusers
import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel, PipelineQuantizationConfig, WanTransformer3DModel
from diffusers.models import modeling_utils as diffusers_modeling
from transformers import modeling_utils as transformers_modeling

from diffusers_ternary import backend as quantizers
from diffusers_ternary.backend import compat, compat_registries
from diffusers_ternary.backend.config import QUANT_METHOD
from diffusers_ternary.backend.transformers import UnpackOnLoad
from integration_tests.support import denoisers, text_encoders


VERSIONS = f"(diffusers {diffusers.__version__}, transformers {transformers.__version__})"


def test_every_name_of_compat_is_there_and_listed():
    for name in compat.__all__:
        assert getattr(compat, name, None) is not None, f"compat.{name} is gone {VERSIONS}"


@pytest.mark.parametrize("host", ["diffusers", "transformers"])
@pytest.mark.parametrize("which", [0, 1])
def test_registries_are_the_dictionaries_that_the_hosts_read(host, which):
    registry = getattr(compat_registries, f"{host}_registries")()[which]
    assert isinstance(registry, dict), f"registry {which} of {host} is not a dictionary any more {VERSIONS}"
    assert "bitsandbytes_4bit" in registry, f"{host} keeps its quantization backends elsewhere {VERSIONS}"
    assert QUANT_METHOD in registry


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (quantizers.TernaryDiffusersQuantizer, compat.DiffusersQuantizer),
        (quantizers.TernaryTransformersQuantizer, compat.HfQuantizer),
    ],
)
def test_every_hook_still_exists(ours, base):
    own = {"attach", "read_tensor", "float_values"}
    for name, member in vars(ours).items():
        hook = callable(member) or isinstance(member, property)
        if hook and not name.startswith("__") and name not in own:
            assert hasattr(base, name), f"{base.__name__} has no hook {name} any more {VERSIONS}"
            assert isinstance(inspect.getattr_static(base, name), property) == isinstance(member, property), (
                f"{base.__name__}.{name} changed between property and method {VERSIONS}"
            )


@pytest.mark.parametrize(
    "hook",
    [
        "maybe_update_loaded_keys",
        "update_missing_keys",
        "preprocess_model",
        "postprocess_model",
        "update_torch_dtype",
        "get_state_dict_and_metadata",
        "is_serializable",
    ],
)
def test_diffusers_still_calls(hook):
    assert f".{hook}" in inspect.getsource(diffusers_modeling), f"diffusers calls {hook} no more {VERSIONS}"


def test_diffusers_loader_still_offers_the_state_dict_hooks():
    from diffusers.models import model_loading_utils

    source = inspect.getsource(model_loading_utils)
    for hook in ("maybe_update_state_dict", "check_if_quantized_param", "create_quantized_param"):
        assert f".{hook}" in source, f"diffusers calls {hook} no more {VERSIONS}"


@pytest.mark.parametrize(
    "hook", ["get_state_dict_and_metadata", "preprocess_model", "postprocess_model", "update_dtype"]
)
def test_transformers_still_calls(hook):
    assert f".{hook}" in inspect.getsource(transformers_modeling), f"transformers calls {hook} no more {VERSIONS}"


def test_transformers_conversions():
    from transformers import core_model_loading

    source = inspect.getsource(core_model_loading)
    for name in ("param_needs_quantization", "get_quantize_ops", "get_new_dtype", "_is_hf_initialized"):
        assert name in source, f"transformers' loader knows {name} no more {VERSIONS}"
    # Operations are copied for every tensor; ours share the quantizer by overriding __deepcopy__.
    assert "deepcopy(pattern_to_converter" in source
    assert "input_dict" in inspect.signature(compat.ConversionOps.convert).parameters
    for keyword in ("full_layer_name=", "model=", "missing_keys="):
        assert keyword in inspect.getsource(compat.WeightConverter.convert), f"{keyword} is passed no more {VERSIONS}"
    assert list(inspect.signature(compat.WeightConverter).parameters)[:3] == [
        "source_patterns",
        "target_patterns",
        "operations",
    ]
    converter = compat.WeightConverter(["weight_scale"], ["weight_scale"], [UnpackOnLoad(None)])
    assert "weight_scale" in converter.source_patterns


def test_forgotten_conversions_are_not_reverted():
    from transformers.core_model_loading import revert_weight_conversion

    model = text_encoders.qwen_vl()
    state = model.state_dict()
    renamed = revert_weight_conversion(model, state)
    assert renamed.keys() != state.keys(), "the model renames nothing any more: choose another one for this canary"
    compat.forget_weight_conversions(model)
    assert revert_weight_conversion(model, state).keys() == state.keys()


def test_what_transformers_does_not_save():
    model = text_encoders.t5()
    state = model.state_dict()
    assert state["shared.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()
    left = compat.drop_unsaved(state, model)
    assert len(left) == len(state) - 1, f"transformers stores tied weights otherwise {VERSIONS}"
    assert compat.drop_unsaved(left, model).keys() == left.keys()
    model._keys_to_ignore_on_save = ["shared.weight"]
    assert "shared.weight" not in compat.drop_unsaved(state, model)


def test_unexpected_tensors_can_be_ignored():
    model = text_encoders.clip()
    compat.ignore_unexpected(model, ["a.b+c"])
    assert any(re.search(pattern, "x.a.b+c") for pattern in model._keys_to_ignore_on_load_unexpected)
    assert not any(re.search(pattern, "xa.b+c") for pattern in model._keys_to_ignore_on_load_unexpected)
    other = text_encoders.clip()
    assert not any(re.search(pattern, "a.b+c") for pattern in other._keys_to_ignore_on_load_unexpected or ())


def test_config_entries_can_be_dropped():
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    model.register_to_config(something="x")
    compat.update_config(model, drop=("something",))
    assert "something" not in model.config, f"model.config is not model._internal_dict any more {VERSIONS}"
    assert model.config.num_layers == 1
    assert "something" not in model.to_json_string()


def test_attributes_that_diffusers_notes_on_the_config_stay():
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    model.config.encoder_hid_dim_type = "ip_image_proj"  # as load_ip_adapter does: no entry
    model.config.num_layers = 7  # nor is this one, beside the entry of 1
    compat.update_config(model, something="x")
    compat.update_config(model, drop=("something",))
    assert model.config.encoder_hid_dim_type == "ip_image_proj", f"attributes need entries {VERSIONS}"
    assert model.config.num_layers == 7
    assert model.config["num_layers"] == 1
    assert not hasattr(model.config, "something")
    assert "encoder_hid_dim_type" not in model.to_json_string()


def test_keep_in_fp32_names():
    with torch.device("meta"):
        wan = WanTransformer3DModel(num_layers=1)
        names = compat.keep_in_fp32_names(wan)
        assert "time_embedder" in names, f"Wan names its float32 modules elsewhere {VERSIONS}"
        assert "wo" in compat.keep_in_fp32_names(text_encoders.t5()), f"T5 keeps wo elsewhere {VERSIONS}"
        assert compat.keep_in_fp32_names(torch.nn.Linear(2, 2)) == []


def test_pipelines_ask_the_config_for_each_component():
    from diffusers.pipelines import pipeline_loading_utils

    parameters = inspect.signature(PipelineQuantizationConfig._resolve_quant_config).parameters
    assert list(parameters) == ["self", "is_diffusers", "module_name"], f"_resolve_quant_config changed {VERSIONS}"
    assert "_resolve_quant_config" in inspect.getsource(pipeline_loading_utils)


def test_quantization_marks_of_models():
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        source = inspect.getsource(diffusers_modeling) + inspect.getsource(transformers_modeling)
        assert name in source, f"{name} is not read any more {VERSIONS}"


def test_errors_of_the_hub_and_of_the_connection_have_one_base():
    from huggingface_hub.errors import HfHubHTTPError

    assert issubclass(HfHubHTTPError, compat.HubTransportError), f"errors of the Hub have another base {VERSIONS}"
    client = importlib.import_module(compat.HubTransportError.__module__.partition(".")[0])
    assert issubclass(client.ConnectError, compat.HubTransportError), f"no base of connection errors {VERSIONS}"


def test_accelerate_knows_2_bit_weights():
    assert accelerate.utils.CustomDtype.INT2 is not None


def test_torch_reports_autocast_per_device():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_fused_projections():
    flux = denoisers.flux()
    attention = flux.transformer_blocks[0].attn
    before = set(dict(attention.named_children()))
    flux.fuse_qkv_projections()
    made = set(dict(attention.named_children())) - before
    assert made == {"to_qkv", "to_added_qkv"}, f"fused projections have other names {VERSIONS}"
    for name in made:
        rows = sum(getattr(attention, source).out_features for source in compat.FUSED_PROJECTIONS[name])
        assert getattr(attention, name).out_features == rows


def test_fuse_projections_can_be_wrapped_wherever_it_is_defined():
    class Base:
        def fuse_projections(self, fuse=True):
            self.fused = fuse

    class Derived(Base):
        pass

    calls = []

    def wrapper(module, original):
        calls.append(module)
        original()

    for _ in range(2):  # the second time nothing is wrapped again
        compat.wrap_fuse_projections(Derived, wrapper)
    module = Derived()
    module.fuse_projections(fuse="yes")
    assert calls == [module]
    assert module.fused == "yes"


def test_the_pipeline_loader_checks_components_where_we_replace_its_check():
    from diffusers.pipelines import pipeline_utils

    name = "_maybe_warn_for_wrong_component_in_quant_config"
    parameters = inspect.signature(getattr(pipeline_utils, name)).parameters
    assert list(parameters) == ["pipe_init_dict", "quant_config"], f"{name} changed {VERSIONS}"
    assert f"{name}(" in inspect.getsource(pipeline_utils.DiffusionPipeline.from_pretrained)
