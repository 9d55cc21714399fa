# SPDX-License-Identifier: Apache-2.0
"""The calibration report as a figure: what calibration gained in each layer, and what each layer costs."""

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..extras import import_extra
from ..files import new_file


if TYPE_CHECKING:
    from .report import CalibrationReport, LayerReport, LayerSensitivity


PLOT = "The figure of the calibration"  # for who lacks its library
# Okabe-Ito colours, by kind of candidate.
_COLORS = {"keep": "#000000", "int8": "#0072b2", "low-rank": "#cc79a7", "ternary": "#d55e00"}
_ROW = 0.18  # inches


def plot_report(report: "CalibrationReport", path: str | os.PathLike[str]) -> None:
    """Draws every layer's output error before and after, and, if it was measured, the ranking by sensitivity.

    Args:
        report ([`CalibrationReport`]): what to draw.
        path (`str` or `os.PathLike`): an image file.

    Raises:
        MissingExtraError: without matplotlib; says what to install.
    """
    figure_module = import_extra("matplotlib.figure", PLOT)
    panels = 2 if report.sensitivity else 1
    rows = max(len(report.layers), len(report.sensitivity))
    figure = figure_module.Figure(figsize=(8 * panels, 1.5 + _ROW * rows), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_errors(axes[0], report.layers)
    if report.sensitivity:
        _plot_sensitivity(axes[1], report.sensitivity)
    figure.suptitle(f"{report.bits_per_weight:.3f} bits per weight, {report.prompts} prompts")
    with new_file(path) as temporary:
        figure.savefig(temporary, format=pathlib.Path(path).suffix.removeprefix(".") or "png", dpi=120)


def _plot_errors(axes: Any, layers: "Sequence[LayerReport]") -> None:
    rows = range(len(layers))
    axes.hlines(rows, [x.error for x in layers], [x.error_rounded for x in layers], color="0.8")
    axes.plot([x.error_rounded for x in layers], rows, "o", color="tab:gray", label="rounded")
    axes.plot([x.error_gptq for x in layers], rows, "o", color="tab:orange", markersize=3, label="GPTQ")
    axes.plot([x.error for x in layers], rows, "o", color="tab:blue", label="calibrated")
    _label_rows(axes, [x.name for x in layers])
    if any(x.error > 0 for x in layers):
        axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the layer's output")
    axes.legend(loc="upper right", fontsize=7)


def _plot_sensitivity(axes: Any, layers: "Sequence[LayerSensitivity]") -> None:
    for row, layer in enumerate(layers):
        for label, error in layer.nmse.items():
            if error > 0:
                axes.plot(error, row, "o", color=_COLORS[_family(label)], markersize=3, alpha=0.6)
        if layer.nmse[layer.chosen] > 0:
            axes.plot(layer.nmse[layer.chosen], row, "o", color=_COLORS[_family(layer.chosen)], markersize=7)
    _label_rows(axes, [f"{layer.name}  {layer.chosen}" for layer in layers])
    if any(error > 0 for layer in layers for error in layer.nmse.values()):
        axes.set_xscale("log")
    used = {_family(label) for layer in layers for label in layer.nmse}
    for family in _COLORS:
        if family in used - {"keep"}:
            axes.plot([], [], "o", color=_COLORS[family], label=family)
    axes.set_xlabel("velocity NMSE with this layer alone replaced (large: chosen)")
    axes.legend(loc="lower right", fontsize=7)


def _family(label: str) -> str:
    if label in _COLORS:
        return label
    return "low-rank" if "-r" in label else "ternary"


def _label_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
