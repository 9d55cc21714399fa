# SPDX-License-Identifier: Apache-2.0
"""Every name of another library that is not part of its documented API, in one place.

Each has a canary in `integration_tests/unit/test_compat.py`, which fails readably when a new version moves it.
"""

from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS_CONFIGS
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as DIFFUSERS_QUANTIZERS
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfigMixin
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS_CONFIGS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as TRANSFORMERS_QUANTIZERS
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin


__all__ = [
    "DIFFUSERS_CONFIGS",
    "DIFFUSERS_QUANTIZERS",
    "TRANSFORMERS_CONFIGS",
    "TRANSFORMERS_QUANTIZERS",
    "ConversionOps",
    "DiffusersConfigMixin",
    "DiffusersQuantizer",
    "HfQuantizer",
    "TransformersConfigMixin",
    "WeightConverter",
    "drop_config_entries",
    "forget_weight_conversions",
    "keep_in_fp32_names",
]


def drop_config_entries(model: Any, names: tuple[str, ...]) -> None:
    """Removes entries from the frozen config of a diffusers model."""
    remaining = {name: value for name, value in model.config.items() if name not in names}
    model._internal_dict = FrozenDict(remaining)


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
