# SPDX-License-Identifier: Apache-2.0
"""Ternary (1.58-bit) diffusion models for Hugging Face diffusers.

Importing this package registers the quantization backend `diffusers_ternary` with diffusers and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .config import TernaryConfig
from .layers import Int8Linear, TernaryLinear
from .lora import register as register_adapters
from .quantizers import quantize, register


if TYPE_CHECKING:
    from .calibration import CalibrationConfig, CalibrationReport, calibrate
    from .demo.pipeline import demo_folder, demo_pipeline
    from .evaluation import EvaluationResult, evaluate

__version__ = "0.1.0"
__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "EvaluationResult",
    "Int8Linear",
    "TernaryConfig",
    "TernaryLinear",
    "calibrate",
    "demo_folder",
    "demo_pipeline",
    "evaluate",
    "quantize",
]

# Loaded when first used: they load most of diffusers, which registering the backend does not need.
_LAZY = {
    "CalibrationConfig": ".calibration",
    "CalibrationReport": ".calibration",
    "calibrate": ".calibration",
    "EvaluationResult": ".evaluation",
    "demo_folder": ".demo.pipeline",
    "demo_pipeline": ".demo.pipeline",
    "evaluate": ".evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
register_adapters()
