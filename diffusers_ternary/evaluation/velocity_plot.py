# SPDX-License-Identifier: Apache-2.0
"""The velocity error over the denoising steps, as a plot."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ..extras import import_extra
from ..files import new_file
from ..rollouts import VelocityError


PLOT = "The plot of the velocity error"  # for who lacks its library


@dataclasses.dataclass(frozen=True)
class _Theme:
    background: str
    ink: str
    grid: str
    lines: tuple[str, ...]


# Okabe-Ito colors: told apart by color-blind readers, on white and on black.
_LIGHT = _Theme("#ffffff", "#1c1c1e", "#dcdce0", ("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
_DARK = _Theme("#1c1c1e", "#ececf0", "#3a3a3e", ("#56b4e9", "#e69f00", "#009e73", "#cc79a7"))


def plot_velocity_error(errors: Mapping[str, VelocityError], path: Any, *, dark: bool = False) -> None:
    """Plots one line per student.

    Args:
        errors (`Mapping[str, VelocityError]`): label → error.
        path (`str`, `os.PathLike` or binary file): where to write; the suffix decides the format, PNG for files.
        dark (`bool`, *optional*, defaults to `False`): for dark pages.

    Raises:
        MissingExtraError: without matplotlib (`pip install diffusers-ternary[evaluate]`).
    """
    figure_module = import_extra("matplotlib.figure", PLOT)
    theme = _DARK if dark else _LIGHT
    # Figure without pyplot: no global state, no display.
    figure = figure_module.Figure(figsize=(7.2, 3.4), dpi=160, facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    for index, (label, error) in enumerate(errors.items()):
        steps = range(1, len(error.per_step) + 1)
        color = theme.lines[index % len(theme.lines)]
        axes.plot(steps, error.per_step, marker="o", markersize=4, linewidth=1.6, color=color, label=label)
    if any(value > 0 for error in errors.values() for value in error.per_step):
        axes.set_yscale("log")
        ticker = import_extra("matplotlib.ticker", PLOT)
        for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_ticks(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("denoising step (1 = pure noise)", color=theme.ink)
    axes.set_ylabel("velocity NMSE", color=theme.ink)
    axes.grid(True, which="major", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.ink, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    if len(errors) > 1:
        axes.legend(frameon=False, labelcolor=theme.ink)
    if isinstance(path, (str, os.PathLike)):
        with new_file(path) as temporary:
            suffix = pathlib.Path(path).suffix
            figure.savefig(temporary, format=suffix.removeprefix(".") or "png", facecolor=theme.background)
    else:
        figure.savefig(path, format="png", facecolor=theme.background)
