# SPDX-License-Identifier: Apache-2.0
"""Ternary (1.58-bit) diffusion models for Hugging Face diffusers.

Importing this package registers the quantization backend `diffusers_ternary` with diffusers and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .backend import quantize, register
from .backend.config import TernaryConfig
from .layers import Int8Conv2d, Int8Linear, TernaryConv2d, TernaryLinear, keep_unpacked
from .lora import register as register_adapters


if TYPE_CHECKING:
    from .calibration import CalibrationConfig, CalibrationReport, SensitivityConfig, SolverConfig, calibrate
    from .calibration.merge_lora import MergeReport, merge_lora
    from .demo.pipeline import demo_folder, demo_pipeline
    from .distillation import DistillConfig, DistillReport, distill
    from .evaluation import EvaluationResult, evaluate
    from .hub import push_to_hub
    from .interop import export_gguf
    from .interop.convert import convert
    from .rollouts.prompt_templates import template_prompts
    from .rollouts.prompts import read_prompts

__version__ = "0.1.0"
__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "DistillConfig",
    "DistillReport",
    "EvaluationResult",
    "Int8Conv2d",
    "Int8Linear",
    "MergeReport",
    "SensitivityConfig",
    "SolverConfig",
    "TernaryConfig",
    "TernaryConv2d",
    "TernaryLinear",
    "calibrate",
    "convert",
    "demo_folder",
    "demo_pipeline",
    "distill",
    "evaluate",
    "export_gguf",
    "keep_unpacked",
    "merge_lora",
    "push_to_hub",
    "quantize",
    "read_prompts",
    "template_prompts",
]

# Loaded when first used: they load most of diffusers, which registering the backend does not need.
_LAZY = {
    "CalibrationConfig": ".calibration",
    "CalibrationReport": ".calibration",
    "DistillConfig": ".distillation",
    "DistillReport": ".distillation",
    "EvaluationResult": ".evaluation",
    "MergeReport": ".calibration.merge_lora",
    "SensitivityConfig": ".calibration",
    "SolverConfig": ".calibration",
    "calibrate": ".calibration",
    "convert": ".interop",
    "demo_folder": ".demo.pipeline",
    "demo_pipeline": ".demo.pipeline",
    "distill": ".distillation",
    "evaluate": ".evaluation",
    "export_gguf": ".interop",
    "merge_lora": ".calibration.merge_lora",
    "push_to_hub": ".hub",
    "read_prompts": ".rollouts.prompts",
    "template_prompts": ".rollouts.prompt_templates",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
register_adapters()
