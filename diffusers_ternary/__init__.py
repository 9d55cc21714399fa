# SPDX-License-Identifier: Apache-2.0
"""Ternary (1.58-bit) diffusion models for Hugging Face diffusers.

Importing this package registers the quantization backend `diffusers_ternary` with diffusers and transformers, as soon
as somebody imports these.
"""

import importlib
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

from .backend.registration import register
from .lora.registration import register as register_adapters


if TYPE_CHECKING:
    from .backend.config import TernaryConfig
    from .backend.quantize import quantize
    from .calibration import CalibrationConfig, calibrate
    from .calibration.merge_lora import merge_lora
    from .demo.pipeline import demo_pipeline
    from .distillation import DistillConfig, distill
    from .evaluation import evaluate
    from .hub import push_to_hub
    from .interop.convert import convert

__version__ = "0.1.0"
__all__ = [
    "CalibrationConfig",
    "DistillConfig",
    "TernaryConfig",
    "calibrate",
    "convert",
    "demo_pipeline",
    "distill",
    "evaluate",
    "merge_lora",
    "push_to_hub",
    "quantize",
]

# Imported when first used: they need torch and diffusers, which take seconds.
_PLACES = {
    "CalibrationConfig": ".calibration.config",
    "DistillConfig": ".distillation.config",
    "TernaryConfig": ".backend.config",
    "calibrate": ".calibration",
    "convert": ".interop.convert",
    "demo_pipeline": ".demo.pipeline",
    "distill": ".distillation",
    "evaluate": ".evaluation",
    "merge_lora": ".calibration.merge_lora",
    "push_to_hub": ".hub",
    "quantize": ".backend.quantize",
}
# Names that were here, and where they are. To be removed with the next minor version.
_MOVED = {
    "CalibrationReport": ".calibration",
    "DistillReport": ".distillation",
    "EvaluationResult": ".evaluation",
    "Int8Conv2d": ".layers",
    "Int8Linear": ".layers",
    "MergeReport": ".calibration.merge_lora",
    "SensitivityConfig": ".calibration",
    "SolverConfig": ".calibration",
    "TernaryConv2d": ".layers",
    "TernaryLinear": ".layers",
    "demo_folder": ".demo",
    "export_gguf": ".interop",
    "keep_unpacked": ".layers",
    "read_prompts": ".rollouts.prompts",
    "template_prompts": ".rollouts.prompt_templates",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name], __name__), name)
    elif name in _MOVED:
        place = __name__ + _MOVED[name]
        old = "The old place goes with the next minor version."
        message = f"diffusers_ternary.{name} has moved: from {place} import {name}. {old}"
        warnings.warn(message, FutureWarning, stacklevel=2)
        value = getattr(importlib.import_module(place), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")  # rooms, without an import of their own
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked for, and warned about, once
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


register()
register_adapters()
