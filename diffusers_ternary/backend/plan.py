# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are converted, to what, and why the others are not."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator

from torch import nn

from ..format import Int8Spec, LayerSpec, TernarySpec
from ..layers import FLOAT_TYPES, FloatLayer, matrix_shape, reason_not_to_pack
from .adapters import is_image_adapter
from .compat import keep_in_fp32_names
from .config import TernaryConfig
from .fused_projections import copied_projections
from .patterns import matches, matches_any
from .policy import policy_for
from .weight_readers import layers_read_by_model


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What happens to each linear layer and 2-d convolution of a model.

    Args:
        kinds (`dict[str, str]`): module name → `"ternary"` or `"int8"`.
        kept (`dict[str, str]`): module name → why it stays as it is.
    """

    kinds: dict[str, str]
    kept: dict[str, str]


def float_layers(model: nn.Module) -> Iterator[tuple[str, FloatLayer]]:
    """Plain `nn.Linear` and `nn.Conv2d` modules by name, without image prompt adapters and fused projections."""
    modules = dict(model.named_modules())
    copies = copied_projections(modules)
    for name, module in modules.items():
        if type(module) in FLOAT_TYPES and name and name not in copies and not is_image_adapter(name):
            assert isinstance(module, FLOAT_TYPES)
            yield name, module


def plan_conversion(
    model: nn.Module, config: TernaryConfig, *, keep_in_fp32: Iterable[str] | None = None
) -> ConversionPlan:
    """Decides for every layer that can be packed: overrides, the user's list, float32 modules, then the policy.

    No override packs a layer whose weight the model reads without calling it, see [`layers_read_by_model`].

    Args:
        model (`nn.Module`): the model; tensors may be on the meta device.
        config ([`TernaryConfig`]): what the user asks for. Left as it is.
        keep_in_fp32 (`Iterable[str]`, *optional*): name components that stay float32; default: what the model says.

    Raises:
        ValueError: if no layer at all is to be converted.
    """
    policy = policy_for(type(model).__name__)
    float32 = set(keep_in_fp32_names(model) if keep_in_fp32 is None else keep_in_fp32)
    float32 -= set(policy.ignore_keep_in_fp32)
    overrides = config.overrides or {}
    skipped = config.modules_to_not_convert or []
    reads = {name: f"its weight is read by {place}" for name, place in layers_read_by_model(model).items()}
    used: set[str] = set()
    kinds: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, module in float_layers(model):
        override = next((pattern for pattern in overrides if matches(pattern, name)), None)
        impossible = reason_not_to_pack(module) or reads.get(name)
        used.update(pattern for pattern in skipped if matches(pattern, name))
        if override is not None:
            used.add(override)
            if overrides[override] == "keep":
                kept[name] = f"overrides[{override!r}]"
            elif impossible is not None:
                kept[name] = impossible
            else:
                kinds[name] = overrides[override]
        elif matches_any(skipped, name):
            kept[name] = "listed in modules_to_not_convert"
        elif float32.intersection(name.split(".")):
            kept[name] = "kept in float32 by the model class"
        elif (
            reason := policy.reason_to_keep(name, module) or reason_not_to_pack(module) or reads.get(name)
        ) is not None:
            kept[name] = reason
        else:
            kinds[name] = config.kind
    for pattern in [*overrides, *skipped]:
        if pattern not in used:
            logger.warning(
                "%r in the TernaryConfig names no linear layer or convolution of %s.", pattern, type(model).__name__
            )
    if not kinds:
        raise ValueError(
            f"{type(model).__name__} has no layer to convert ({len(kept)} linear layers and convolutions, all kept). "
            "Name layers in overrides, e.g. overrides={'*': 'ternary'}, or leave this component out."
        )
    return ConversionPlan(kinds, kept)


def layer_spec(kind: str, module: FloatLayer, config: TernaryConfig) -> LayerSpec:
    """Spec of the layer that replaces `module`; a weight that is ternary already is packed with one of its own."""
    rows, columns = matrix_shape(module)
    if kind == "int8":
        return Int8Spec(rows, columns)
    return TernarySpec.for_matrix(rows, columns, **config.spec_options)
