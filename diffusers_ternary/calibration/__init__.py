# SPDX-License-Identifier: Apache-2.0
"""Calibration: the best ternary codes that prompts alone can find."""

from .calibrate import calibrate
from .config import CalibrationConfig, SensitivityConfig, SolverConfig
from .report import CalibrationReport, LayerReport, LayerSensitivity


__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "LayerReport",
    "LayerSensitivity",
    "SensitivityConfig",
    "SolverConfig",
    "calibrate",
]
