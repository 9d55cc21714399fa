# SPDX-License-Identifier: Apache-2.0
"""`quantize`: ternarizes models that are in memory already."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..layers import FLOAT_TYPES, FloatLayer, QuantizedLayer
from ..progress import Bar
from ..ternarize import check_finite, find_group_size, ternary_fit
from .compat_offload import casting_hook, is_group_offloaded
from .components import below_compiled_wrappers, is_pipeline, modules_of
from .config import RECOVER, TernaryConfig, given_or_default
from .diffusers import TernaryDiffusersQuantizer
from .fused_projections import with_separate_projections
from .pack import NOT_TERNARY, PackingRecord, nothing_ternary, pack_layer
from .placeholders import placeholder_for
from .plan import ConversionPlan, layer_spec, plan_conversion
from .summary import summarize
from .transformers import TernaryTransformersQuantizer


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT")
# Fills a placeholder: (module name, placeholder, the float layer it replaces).
LayerFiller = Callable[[str, QuantizedLayer, FloatLayer], None]


@below_compiled_wrappers
@with_separate_projections
def quantize(model_or_pipeline: ModelT, config: TernaryConfig | None = None) -> ModelT:
    """Ternarizes a model, or the components of a pipeline that `config` selects, in place.

    One layer at a time: beside the model, at most one layer is in float32. The result saves, loads and dequantizes
    like one from `from_pretrained(..., quantization_config=config)`.

    Args:
        model_or_pipeline (`nn.Module` or `DiffusionPipeline`): what to quantize; also plain modules.
        config ([`TernaryConfig`], *optional*): how.

    Returns:
        The same object.

    Raises:
        ValueError: if it is quantized already, carries LoRA layers, has nothing to convert, or holds NaN or Inf;
            nothing is changed then.
        TypeError: for anything that is neither a module nor a pipeline, and for a config of another class.
    """
    config = given_or_default("config", config, TernaryConfig)
    if is_pipeline(model_or_pipeline):
        for name, plan in plan_pipeline(model_or_pipeline, config).items():
            replace_layers(modules_of(model_or_pipeline)[name], plan, config.for_component(name) or config)
    elif isinstance(model_or_pipeline, nn.Module):
        replace_layers(model_or_pipeline, _checked_plan(model_or_pipeline, config), config)
    else:
        raise TypeError(f"quantize takes a model or a pipeline, got {type(model_or_pipeline).__name__}.")
    return model_or_pipeline


def plan_pipeline(pipeline: "DiffusionPipeline", config: TernaryConfig) -> dict[str, ConversionPlan]:
    """What to convert in each component of a pipeline that `config` selects, after all checks. Nothing is changed.

    A module that serves under several component names has one plan, under the first of them.

    Raises:
        ValueError: if there is no such component, or one is quantized already, carries LoRA layers, has nothing to
            convert, is not in memory, holds NaN or Inf, or is to be quantized in two ways under two names.
    """
    modules = modules_of(pipeline)
    missing = [name for name in config.components or [] if name not in modules]
    selected = {name: own for name in modules if (own := config.for_component(name)) is not None}
    if missing or not selected:
        raise ValueError(
            f"{type(pipeline).__name__} has no component {', '.join(missing) or 'that denoises'} to quantize. "
            f"Choose from {', '.join(modules)} with TernaryConfig(components=[...])."
        )
    first: dict[int, str] = {}
    for name, own in selected.items():
        shared = first.setdefault(id(modules[name]), name)
        if own != selected[shared]:
            raise ValueError(
                f"{shared} and {name} of the {type(pipeline).__name__} are the same module and cannot be quantized in "
                f"two ways: give both one kind in TernaryConfig(components=...)."
            )
    return {name: _checked_plan(modules[name], selected[name]) for name in first.values()}


def _checked_plan(model: nn.Module, config: TernaryConfig) -> ConversionPlan:
    """Everything that can go wrong goes wrong here, before the first layer is replaced."""
    _check_quantizable(model)
    plan = plan_conversion(model, config)
    for name in plan.kinds:
        check_finite(model.get_parameter(f"{name}.weight"), name=name)
    return _ternary_layers_only(model, plan) if config.rounding == RECOVER else plan


def _ternary_layers_only(model: nn.Module, plan: ConversionPlan) -> ConversionPlan:
    weights = {name: model.get_parameter(f"{name}.weight").detach().flatten(1) for name in plan.kinds}
    kinds = {
        name: kind for name, kind in plan.kinds.items() if kind == "int8" or find_group_size(weights[name]) is not None
    }
    if not any(kind == "ternary" for kind in kinds.values()):
        fits = {name: ternary_fit(weight) for name, weight in weights.items()}
        raise nothing_ternary(model, fits, looked_at=len(fits))
    return ConversionPlan(kinds, {**plan.kept, **{name: NOT_TERNARY for name in plan.kinds if name not in kinds}})


def replace_layers(
    model: nn.Module, plan: ConversionPlan, config: TernaryConfig, *, fill: LayerFiller | None = None
) -> None:
    """Replaces the layers of a plan one at a time, and attaches the quantizer that saves and loads the model.

    Args:
        model (`nn.Module`): changed in place.
        plan ([`ConversionPlan`]): from [`plan_pipeline`].
        config ([`TernaryConfig`]): what the plan was made with.
        fill (`Callable`, *optional*): packs a layer; default: rounding as `config` says.
    """
    record = PackingRecord()
    fill = fill or _rounding_filler(config, record)
    for name, kind in Bar(plan.kinds.items(), "Packing layers"):
        module = model.get_submodule(name)
        assert isinstance(module, FLOAT_TYPES)
        layer = placeholder_for(module, layer_spec(kind, module, config), config)
        fill(name, layer, module)
        model.set_submodule(name, layer)
    _attach_quantizer(model, config)
    record.report(model)
    logger.info("%s", summarize(model, plan.kept))


def _rounding_filler(config: TernaryConfig, record: PackingRecord) -> LayerFiller:
    def fill(name: str, layer: QuantizedLayer, module: FloatLayer) -> None:
        pack_layer(layer, module.weight.detach(), name=name, config=config, record=record)

    return fill


def _check_quantizable(model: nn.Module) -> None:
    name = type(model).__name__
    method = getattr(model, "quantization_method", None)
    if method is not None or any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(
            f"{name} is quantized already ({getattr(method, 'value', method) or 'packed layers'}). "
            "Load the float weights, or call its dequantize() first."
        )
    adapted = [module for module in model.modules() if hasattr(module, "base_layer")]
    if adapted and all(getattr(module, "merged_adapters", None) for module in adapted):
        raise ValueError(
            f"{name} carries adapter layers, whose adapters are fused. Unload them before quantizing with "
            "pipe.unload_lora_weights() or PEFT's unload(): what is fused stays in the weights."
        )
    if adapted:
        raise ValueError(
            f"{name} carries adapter layers. Fuse the adapters if the model is to keep what they do, and unload them, "
            "before quantizing: pipe.fuse_lora(), pipe.unload_lora_weights()."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{name} has weights that are not in memory (meta device: offloaded, or never loaded). "
            "Quantize before offloading is enabled."
        )
    if is_group_offloaded(model):
        raise ValueError(f"{name} is group offloaded. Quantize before offloading is enabled.")
    if any(casting_hook(module) is not None for module in model.modules()):
        raise ValueError(
            f"{name} stores its weights in 8 bits (enable_layerwise_casting), which has rounded them. "
            "Quantize first: packed layers are smaller, and layerwise casting may follow for the others."
        )


def _attach_quantizer(model: nn.Module, config: TernaryConfig) -> None:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    quantizer: Any
    if isinstance(model, ModelMixin):
        quantizer = TernaryDiffusersQuantizer(config, pre_quantized=False)
    elif isinstance(model, PreTrainedModel):
        quantizer = TernaryTransformersQuantizer(config, pre_quantized=False)
    else:
        return  # a plain module: its packed layers are all there is to it
    quantizer.attach(model)
