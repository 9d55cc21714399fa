# SPDX-License-Identifier: Apache-2.0
"""`TernaryConfig`: every impossible value, files, equality, and the user's objects left alone."""

import copy
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, PipelineQuantizationConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from transformers.quantizers.auto import AutoHfQuantizer

from diffusers_ternary import TernaryConfig, calibrate, distill, merge_lora, quantize
from diffusers_ternary.backend import TernaryDiffusersQuantizer, TernaryTransformersQuantizer
from diffusers_ternary.format import WRITTEN_VERSION
from diffusers_ternary.layers import TernaryLinear
from integration_tests.support import denoisers


FULL = {
    "group_size": 64,
    "modules_to_not_convert": ["proj_out", "*.to_q"],
    "overrides": {"*.norm1.linear": "int8", "x_embedder": "ternary", "*.ff.*": "keep"},
    "activation_dtype": "int8",
    "compute_dtype": "bfloat16",
    "components": ["transformer", "text_encoder_2"],
    "rounding": "optimum",
    "scale_layout": "group",
    "format_version": 2,
}


class TestValues:
    def test_defaults(self):
        config = TernaryConfig()
        assert config.group_size == 128
        assert config.activation_dtype == "auto"
        assert config.rounding == "twn"
        assert config.format_version == WRITTEN_VERSION
        assert config.modules_to_not_convert is config.overrides is config.components is config.compute_dtype is None

    @pytest.mark.parametrize("group_size", [None, 1, 7, 128, 10**6])
    def test_any_positive_group_size(self, group_size):
        assert TernaryConfig(group_size=group_size).group_size == group_size

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_compute_dtype_by_name_and_by_object(self, dtype):
        by_name, by_object = TernaryConfig(compute_dtype=dtype), TernaryConfig(compute_dtype=getattr(torch, dtype))
        assert by_name == by_object
        assert by_name.torch_compute_dtype is getattr(torch, dtype)
        assert TernaryConfig(compute_dtype=f"torch.{dtype}") == by_name

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"group_size": 0}, ValueError, "group_size=0 must be a positive integer, or None"),
            ({"group_size": -128}, ValueError, "group_size=-128 must be a positive integer"),
            ({"group_size": 128.0}, TypeError, "group_size=128.0 must be a positive integer"),
            ({"group_size": "128"}, TypeError, "group_size='128' must be a positive integer"),
            ({"group_size": True}, TypeError, "group_size=True must be a positive integer"),
            ({"modules_to_not_convert": "proj_out"}, TypeError, r"='proj_out' must be a list of names"),
            ({"modules_to_not_convert": [1]}, TypeError, r"=\[1\] must be a list of names"),
            ({"modules_to_not_convert": {"a": "b"}}, TypeError, "must be a list of names"),
            ({"components": "transformer"}, TypeError, "components='transformer' must be a list of names"),
            ({"overrides": ["a"]}, TypeError, "must map patterns to kinds"),
            ({"overrides": {"a": "int4"}}, ValueError, r"overrides\['a'\]='int4' is not one of ternary, int8, keep"),
            ({"overrides": {"a": None}}, ValueError, r"overrides\['a'\]=None is not one of"),
            ({"overrides": {1: "int8"}}, TypeError, "the pattern 1 must be a string"),
            (
                {"activation_dtype": "int4"},
                ValueError,
                "activation_dtype='int4' is not one of auto, int8, float8",
            ),
            ({"activation_dtype": None}, ValueError, "activation_dtype=None is not one of"),
            ({"activation_dtype": torch.int8}, ValueError, "activation_dtype=torch.int8 is not one of"),
            ({"compute_dtype": "int8"}, ValueError, "compute_dtype='int8' is not one of float32, bfloat16, float16"),
            ({"compute_dtype": torch.float64}, ValueError, "compute_dtype=torch.float64 is not one of"),
            ({"rounding": "nearest"}, ValueError, "rounding='nearest' is not one of twn, optimum, absmean"),
            ({"scale_layout": "triple"}, ValueError, "scale_layout='triple' is not one of auto, group, double"),
            ({"format_version": 4}, ValueError, "format_version=4 is newer than 3.*pip install -U diffusers-ternary"),
            ({"format_version": 0}, ValueError, "format_version=0 is not a positive integer"),
            ({"format_version": "1"}, ValueError, "format_version='1' is not a positive integer"),
        ],
    )
    def test_impossible_values_say_what_is_possible(self, arguments, error, message):
        with pytest.raises(error, match=message):
            TernaryConfig(**arguments)

    @pytest.mark.parametrize(
        ("name", "hint"), [("groupsize", "group_size"), ("module_to_not_convert", "modules_to_not_convert")]
    )
    def test_unknown_arguments_get_a_hint(self, name, hint):
        with pytest.raises(TypeError, match=rf"does not know {name}\. Did you mean {hint}\?.*pip install -U"):
            TernaryConfig(**{name: 1})

    def test_an_argument_like_none_gets_the_list(self):
        with pytest.raises(TypeError, match=r"does not know bits\. It takes group_size, modules_to_not_convert"):
            TernaryConfig(bits=2)

    def test_arguments_have_names(self):
        with pytest.raises(TypeError, match="positional argument"):
            TernaryConfig(64)


class TestScaleLayout:
    def test_files_call_it_scales(self):
        """What every version has written and reads."""
        config = TernaryConfig(scale_layout="group")
        assert config.to_dict()["scales"] == "group"
        assert "scale_layout" not in config.to_dict()
        assert TernaryConfig.from_dict({"quant_method": "diffusers_ternary", "scales": "group"}) == config

    def test_the_old_name_works_and_warns(self):
        with pytest.warns(FutureWarning, match="scales is scale_layout now"):
            config = TernaryConfig(scales="group")
        assert config == TernaryConfig(scale_layout="group")
        with pytest.warns(FutureWarning, match="scales is scale_layout now"):
            assert config.scales == "group"


class TestObjects:
    def test_equality(self):
        assert TernaryConfig() == TernaryConfig()
        assert TernaryConfig(**FULL) == TernaryConfig(**copy.deepcopy(FULL))
        assert TernaryConfig() != TernaryConfig(group_size=64)
        assert TernaryConfig() != "diffusers_ternary"
        assert TernaryConfig() != TernaryConfig().to_dict()

    def test_the_order_of_overrides_matters(self):
        # The first matching pattern decides, so two orders are two configs; hosts sort the keys of their JSON.
        one, other = {"*.to_q": "int8", "*": "keep"}, {"*": "keep", "*.to_q": "int8"}
        assert TernaryConfig(overrides=one) != TernaryConfig(overrides=other)
        for overrides in (one, other):
            config = TernaryConfig(overrides=overrides)
            for use_diff in (True, False):
                read = TernaryConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff)))
                assert list(read.overrides.items()) == list(overrides.items())

    def test_user_objects_are_copied(self):
        names, overrides, components = ["proj_out"], {"*": "int8"}, ["unet"]
        config = TernaryConfig(modules_to_not_convert=names, overrides=overrides, components=components)
        names.append("x")
        overrides["y"] = "keep"
        components.clear()
        assert config == TernaryConfig(
            modules_to_not_convert=["proj_out"], overrides={"*": "int8"}, components=["unet"]
        )
        config.to_dict()["overrides"].append(["z", "keep"])
        assert "z" not in config.overrides

    def test_copies(self):
        config = TernaryConfig(**FULL)
        assert copy.deepcopy(config) == config
        assert copy.copy(config) == config

    def test_repr_can_be_read_back(self):
        config = TernaryConfig(**FULL)
        assert eval(repr(config)) == config

    @pytest.mark.parametrize(
        ("components", "selected"),
        [(None, {"transformer", "transformer_2", "unet", "prior"}), (["text_encoder"], {"text_encoder"}), ([], set())],
    )
    def test_which_components(self, components, selected):
        names = ["transformer", "transformer_2", "unet", "prior", "vae", "text_encoder", "transformers", "my_unet"]
        config = TernaryConfig(components=components)
        assert {name for name in names if config.selects(name)} == selected


class TestFiles:
    @pytest.mark.parametrize("fields", [{}, FULL, {"group_size": None, "compute_dtype": torch.float16}])
    def test_dict_and_json_round_trip(self, fields):
        config = TernaryConfig(**fields)
        assert TernaryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert TernaryConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
        assert TernaryConfig.from_dict(json.loads(config.to_json_string(use_diff=True))) == config
        assert config.to_dict()["quant_method"] == "diffusers_ternary"

    def test_json_file(self, tmp_path):
        config = TernaryConfig(**FULL)
        config.to_json_file(tmp_path / "quantization.json")
        assert TernaryConfig.from_dict(json.loads((tmp_path / "quantization.json").read_text())) == config

    def test_from_dict_leaves_its_argument_alone(self):
        data = TernaryConfig(**FULL).to_dict()
        before = copy.deepcopy(data)
        TernaryConfig.from_dict(data)
        assert data == before

    def test_from_dict_can_return_unused_arguments(self):
        config, unused = TernaryConfig.from_dict({"group_size": 64}, return_unused_kwargs=True)
        assert config.group_size == 64
        assert unused == {}

    def test_another_method_is_refused(self):
        with pytest.raises(ValueError, match="quant_method='torchao' is not 'diffusers_ternary'"):
            TernaryConfig.from_dict({"quant_method": "torchao"})

    def test_a_newer_version_is_refused_before_its_fields(self):
        data = {**TernaryConfig().to_dict(), "format_version": 4, "rotation": "hadamard"}
        with pytest.raises(ValueError, match=r"config\.json: format_version=4 is newer than 3.*pip install -U"):
            TernaryConfig.from_dict(data)

    def test_model_config_json(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "float")
        config = TernaryConfig(**{**FULL, "components": None})
        before = copy.deepcopy(config)
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
        assert config == before, "from_pretrained must not change the user's object"
        model.save_pretrained(tmp_path / "packed")
        written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
        assert written["quant_method"] == "diffusers_ternary"
        assert TernaryConfig.from_dict(written) == config
        reloaded = FluxTransformer2DModel.from_pretrained(tmp_path / "packed")
        assert reloaded.config.quantization_config == config


class TestHosts:
    @pytest.mark.parametrize("auto", [DiffusersAutoQuantizer, AutoHfQuantizer])
    def test_registered_by_import(self, auto):
        quantizer = auto.from_config(TernaryConfig())
        expected = TernaryDiffusersQuantizer if auto is DiffusersAutoQuantizer else TernaryTransformersQuantizer
        assert type(quantizer) is expected
        assert type(auto.from_config(TernaryConfig().to_dict())) is expected

    def test_quant_mapping(self):
        mapping = PipelineQuantizationConfig(quant_mapping={"transformer": TernaryConfig(group_size=64)})
        assert mapping._resolve_quant_config(is_diffusers=True, module_name="transformer").group_size == 64
        assert mapping._resolve_quant_config(is_diffusers=True, module_name="vae") is None

    def test_quant_backend(self):
        config = PipelineQuantizationConfig(
            quant_backend="diffusers_ternary",
            quant_kwargs={"group_size": 64},
            components_to_quantize=["transformer", "text_encoder"],
        )
        for is_diffusers, name in [(True, "transformer"), (False, "text_encoder")]:
            resolved = config._resolve_quant_config(is_diffusers=is_diffusers, module_name=name)
            assert resolved == TernaryConfig(group_size=64)

    def test_the_files_config_wins_over_the_argument(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "float")
        FluxTransformer2DModel.from_pretrained(
            tmp_path / "float", quantization_config=TernaryConfig(group_size=64)
        ).save_pretrained(tmp_path / "packed")
        with pytest.warns(UserWarning, match="quantization_config"):
            model = FluxTransformer2DModel.from_pretrained(
                tmp_path / "packed", quantization_config=TernaryConfig(group_size=32)
            )
        layer = model.transformer_blocks[0].attn.to_q
        assert isinstance(layer, TernaryLinear)
        assert layer.spec.group_size == 64
        assert model.config.quantization_config.group_size == 64


@pytest.mark.parametrize(
    ("verb", "argument", "cls"),
    [
        (quantize, "config", "TernaryConfig"),
        (calibrate, "config", "TernaryConfig"),
        (calibrate, "calibration", "CalibrationConfig"),
        (merge_lora, "calibration", "CalibrationConfig"),
        (distill, "config", "TernaryConfig"),
        (distill, "distill_config", "DistillConfig"),
    ],
)
def test_a_config_of_another_class_is_named_by_every_verb(verb, argument, cls):
    given = (torch.nn.Linear(2, 2),) if verb in (quantize, merge_lora) else (None, ["a prompt"])
    with pytest.raises(TypeError, match=rf"{argument}='ternary' is not a {cls}\. Give {argument}={cls}\(\.\.\.\)"):
        verb(*given, **{argument: "ternary"})
