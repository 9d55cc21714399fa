# SPDX-License-Identifier: Apache-2.0
"""diffusers' own tester mixins, with ternary models in the place of float ones. Collected by `run.py` alone.

`tests` is the package of the checkout that `run.py` was given. Its mixins make the model under test with
`self.model_class(**self.get_init_dict())`: here that call returns the quantized model. Tests that ask for an
accelerator take the CPU for one.
"""

import functools
import importlib
import os
import tempfile
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ModelMixin
from tests import testing_utils as upstream  # type: ignore[import-not-found]
from transformers import T5Config

from diffusers_ternary import TernaryConfig
from diffusers_ternary.layers import TernaryConv2d, TernaryLinear
from integration_tests.support.tokenizers import clip_tokenizer, t5_tokenizer


for _name in ("require_accelerator", "require_torch_accelerator", "require_torch_accelerator_with_training"):
    setattr(upstream, _name, lambda test: test)  # before the mixins are imported, which are decorated with them

models = importlib.import_module("tests.models.testing_utils")
pipelines = importlib.import_module("tests.pipelines.testing_utils")
quantization = importlib.import_module("tests.models.testing_utils.quantization")

# Module below tests/models and the class that describes its model.
DESCRIPTIONS = {
    "flux": ("transformers.test_models_transformer_flux", "FluxTransformerTesterConfig"),
    "flux2": ("transformers.test_models_transformer_flux2", "Flux2TransformerTesterConfig"),
    "qwen_image": ("transformers.test_models_transformer_qwenimage", "QwenImageTransformerTesterConfig"),
    "sana": ("transformers.test_models_transformer_sana", "SanaTransformerTesterConfig"),
    "sd3": ("transformers.test_models_transformer_sd3", "SD3TransformerTesterConfig"),
    "wan": ("transformers.test_models_transformer_wan", "WanTransformer3DTesterConfig"),
    "z_image": ("transformers.test_models_transformer_z_image", "ZImageTransformerTesterConfig"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ternary": {},
    "groups": {"group_size": 16},
    "corrected": {"group_size": 16, "rank": 4},
    "rotated": {"hadamard": 16},
    "int8": {"kind": "int8"},
}
# The policy keeps embedders and final projections; this asks for every layer.
EVERYTHING = {"overrides": {"*": "ternary"}}


# For comparison: what fails with float models, too, is not this backend's.
FLOAT = "UPSTREAM_FLOAT" in os.environ


def quantize(model: ModelMixin, **settings: Any) -> ModelMixin:
    """The model as `from_pretrained(..., quantization_config=...)` loads it."""
    if FLOAT:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=TernaryConfig(**settings))


def ternary_class(cls: type[ModelMixin]) -> type[ModelMixin]:
    """A model class whose constructor makes quantized models of `cls`."""

    class Quantizing(type(cls)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> ModelMixin:
            return quantize(cls(*args, **kwargs))

    # A model that is loaded is of the class itself: it is quantized by what its config.json says.
    return Quantizing(cls.__name__, (cls,), {"from_pretrained": staticmethod(cls.from_pretrained)})


@functools.cache
def saved(description: type) -> tempfile.TemporaryDirectory[str]:
    """A float model in a folder, in the place of the tiny ones on the Hub."""
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    described = description()
    described.model_class(**described.get_init_dict()).save_pretrained(folder.name)
    return folder


class TernaryMixin:
    """What a backend brings to the quantization mixins."""

    @property
    def pretrained_model_name_or_path(self) -> str:
        return saved(self.description).name  # type: ignore[attr-defined]

    @property
    def pretrained_model_kwargs(self) -> dict[str, Any]:
        return {}

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> ModelMixin:
        place = self.pretrained_model_name_or_path
        return self.model_class.from_pretrained(  # type: ignore[attr-defined]
            place, quantization_config=TernaryConfig(**config_kwargs), **extra
        )

    def _verify_if_layer_quantized(self, name: str, module: torch.nn.Module, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, TernaryLinear | TernaryConv2d), f"{name} is {type(module).__name__}"


class QuantizationTests(TernaryMixin, quantization.QuantizationTesterMixin):  # type: ignore[misc,name-defined]
    """Every helper of `QuantizationTesterMixin`."""

    sharded_serialization_config: ClassVar[dict[str, Any]] = CONFIGS["ternary"]

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize(
        "helper", ["quantization_inference", "quantization_memory_footprint", "quantization_lora_inference"]
    )
    def test_config(self, helper: str, config: str) -> None:
        getattr(self, f"_test_{helper}")(CONFIGS[config])

    @pytest.mark.parametrize("config", CONFIGS)
    def test_serialization(self, config: str, tmp_path: Any) -> None:
        self._test_quantization_serialization(CONFIGS[config], tmp_path)

    @pytest.mark.parametrize(
        "helper",
        [
            "dequantize",
            "keep_modules_in_fp32",
            "original_dtype",
            "quantization_config_serialization",
            "quantization_cpu_device_map",
            "quantization_device_map",
            "quantization_dtype_assignment",
            "quantization_num_parameters",
            "quantization_training",
        ],
    )
    def test_helper(self, helper: str) -> None:
        getattr(self, f"_test_{helper}")(CONFIGS["ternary"])

    def test_quantized_layers(self) -> None:
        self._test_quantized_layers(EVERYTHING)

    def test_modules_to_not_convert(self) -> None:
        self._test_quantization_modules_to_not_convert(CONFIGS["ternary"], ["to_k"])


class QuantizationCompileTests(TernaryMixin, quantization.QuantizationCompileTesterMixin):  # type: ignore[misc,name-defined]
    """Both helpers of `QuantizationCompileTesterMixin`."""

    def test_compile(self) -> None:
        self._test_torch_compile(CONFIGS["ternary"])

    def test_compile_with_group_offload(self) -> None:
        self._test_torch_compile_with_group_offload(CONFIGS["ternary"])


COMPILING = "UPSTREAM_WITHOUT_COMPILE" not in os.environ
QUANTIZING = {"Quantization": QuantizationTests}
ADDRESSED = {
    "Model": models.ModelTesterMixin,
    "Memory": models.MemoryTesterMixin,
    "Lora": models.LoraTesterMixin,
    "Attention": models.AttentionTesterMixin,
    "Training": models.TrainingTesterMixin,
}
# One model has these, which take long: the others would compile the same layers.
FLUX = {"QuantizationCompile": QuantizationCompileTests} if COMPILING else {}
FLUX_ADDRESSED = (
    {"Compile": models.TorchCompileTesterMixin, "HotSwap": models.LoraHotSwappingForModelTesterMixin}
    if COMPILING
    else {}
)


def _model_tests() -> dict[str, type]:
    made = {}
    for model in os.environ.get("UPSTREAM_MODELS", " ".join(DESCRIPTIONS)).split():
        module, name = DESCRIPTIONS[model]
        description = getattr(importlib.import_module(f"tests.models.{module}"), name)
        ternary = ternary_class(description().model_class)
        camel = "".join(part.title() for part in model.split("_"))
        for mixin, cls in {**QUANTIZING, **(FLUX if model == "flux" else {})}.items():
            made[f"Test{camel}{mixin}"] = type(f"Test{camel}{mixin}", (cls, description), {"description": description})
        for mixin, cls in {**ADDRESSED, **(FLUX_ADDRESSED if model == "flux" else {})}.items():
            members: dict[str, Any] = {"model_class": ternary}
            if mixin == "Training":
                expected = {description().model_class.__name__}
                members["test_gradient_checkpointing_is_applied"] = functools.partialmethod(
                    cls.test_gradient_checkpointing_is_applied, expected_set=expected
                )
            made[f"Test{camel}{mixin}"] = type(f"Test{camel}{mixin}", (description, cls), members)
    return made


globals().update(_model_tests())


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines

flux = importlib.import_module("tests.pipelines.flux.test_pipeline_flux")


class _Local:
    """Stands in for a class whose `from_pretrained` asks the Hub for a test's tokenizer or config."""

    def __init__(self, make: Any) -> None:
        self.from_pretrained = lambda *args, **kwargs: make()


flux.AutoTokenizer = _Local(t5_tokenizer)
flux.CLIPTokenizer = _Local(clip_tokenizer)
flux.AutoConfig = _Local(
    lambda: T5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
)


class TernaryFlux(flux.FluxPipelineTesterConfig):  # type: ignore[misc,name-defined]
    """The pipeline's test description with a quantized transformer."""

    def get_dummy_components(self, **kwargs: Any) -> dict[str, Any]:
        components = super().get_dummy_components(**kwargs)
        return {**components, "transformer": quantize(components["transformer"])}


class TestFluxPipeline(TernaryFlux, pipelines.PipelineTesterMixin):  # type: ignore[misc,name-defined]
    pass


class TestFluxPipelineMemory(TernaryFlux, pipelines.MemoryTesterMixin):  # type: ignore[misc,name-defined]
    pass


class TestFluxPipelineLora(TernaryFlux, pipelines.LoraTesterMixin):  # type: ignore[misc,name-defined]
    pass


class TestFluxPipelineLoraMemory(TernaryFlux, pipelines.LoraMemoryTesterMixin):  # type: ignore[misc,name-defined]
    pass
