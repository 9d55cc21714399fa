# SPDX-License-Identifier: Apache-2.0
"""Calibration: the best ternary codes that prompts alone can find."""

from .calibrate import calibrate
from .config import CalibrationConfig, SolverConfig
from .report import CalibrationReport, LayerReport


__all__ = ["CalibrationConfig", "CalibrationReport", "LayerReport", "SolverConfig", "calibrate"]
