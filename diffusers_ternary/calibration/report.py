# SPDX-License-Identifier: Apache-2.0
"""What a calibration did, layer by layer: as data, as a table and as a figure."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..backend.components import encodes_text
from ..extras import import_extra
from ..files import new_file, write_json
from ..lora import FoldedAdapter


PLOT = "The figure of the calibration"  # for who lacks its library
_TABLE_ROWS = 15
_ROW_HEIGHT = 0.18  # inches, in the figure
# Okabe-Ito colors, by kind of candidate.
_COLORS = {"keep": "#000000", "int8": "#0072b2", "low-rank": "#cc79a7", "ternary": "#d55e00"}


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One calibrated layer. Errors are E|W x - Ŵ x - Δb|² / E|W x|² over the calibration inputs.

    Args:
        name (`str`): component and module, e.g. `transformer.transformer_blocks.0.attn.to_q`.
        shape (`tuple[int, int]`): [N, K].
        group_size (`int`): columns per scale.
        scales (`str`): scale layout.
        bits_per_weight (`float`): stored in a file, scales included.
        error_rounded (`float`): of plain TWN rounding.
        error_gptq (`float`): of GPTQ without coordinate descent and refit.
        error (`float`): of what was packed.
        damping (`float`): fraction of H's mean diagonal that was added.
        tokens (`int`): input rows behind the statistics.
        seconds (`float`): of the solver.
        resumed (`bool`): whether an earlier run had finished it.
        hadamard (`int`): block size of the rotation of the inputs; 0 = none.
        rank (`int`): of the low-rank correction; 0 = none.
        column_scales (`bool`): whether the inputs are scaled one by one.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    scales: str
    bits_per_weight: float
    error_rounded: float
    error_gptq: float
    error: float
    damping: float
    tokens: int
    seconds: float
    resumed: bool
    hadamard: int = 0
    rank: int = 0
    column_scales: bool = False

    @property
    def stored_as(self) -> str:
        """Group size, scale layout, column scales, rotation and rank, in short."""
        inputs = " columns" if self.column_scales else ""
        inputs += f" rotated {self.hadamard}" if self.hadamard else ""
        return f"g{self.group_size} {self.scales}{inputs}" + (f" r{self.rank}" if self.rank else "")


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """How much the denoiser's output loses by each way to store a layer, everything else in full precision.

    Args:
        name (`str`): component and module.
        shape (`tuple[int, int]`): [N, K].
        bytes (`Mapping[str, int]`): candidate → bytes of the weight in a file.
        nmse (`Mapping[str, float]`): candidate → mean |v - v_teacher|² / mean |v_teacher|² on held states.
        chosen (`str`): the candidate that was taken.
    """

    name: str
    shape: tuple[int, int]
    bytes: Mapping[str, int]
    nmse: Mapping[str, float]
    chosen: str

    @property
    def worst(self) -> float:
        """The error of the config's own candidate, the first."""
        return next(iter(self.nmse.values()))


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """The whole calibration.

    Args:
        layers (`tuple[LayerReport, ...]`): in the order of the model.
        bits_per_weight (`float`): stored bits per weight of all components' layers that the config converts: int8
            layers, and those that a size budget keeps, included.
        prompts (`int`): how many.
        prompts_sha256 (`str`): hash of the prompts, in order.
        weights_sha256 (`str`): hash of the float pipeline's weights.
        passes (`int`): times the prompts were run.
        statistics_bytes (`int`): largest amount of statistics held at once.
        seconds_statistics (`float`): wall time of the rollouts.
        seconds_solver (`float`): wall time of the solver, resumed layers not counted.
        config (`Mapping[str, Any]`): the [`TernaryConfig`].
        calibration (`Mapping[str, Any]`): the [`CalibrationConfig`], with the seed.
        versions (`Mapping[str, str]`): of the libraries, and the device.
        sensitivity (`tuple[LayerSensitivity, ...]`): the most sensitive layer first; empty if it was not measured.
        velocity_nmse (`Mapping[str, float]`): component → error of the whole calibrated denoiser on the states that
            the sensitivity was measured on (of a text encoder: of the embeddings); empty if it was not measured.
        adapters (`tuple[FoldedAdapter, ...]`): that were folded into the float pipeline before.
    """

    layers: tuple[LayerReport, ...]
    bits_per_weight: float
    prompts: int
    prompts_sha256: str
    weights_sha256: str
    passes: int
    statistics_bytes: int
    seconds_statistics: float
    seconds_solver: float
    config: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    sensitivity: tuple[LayerSensitivity, ...] = ()
    velocity_nmse: Mapping[str, float] = dataclasses.field(default_factory=dict)
    adapters: tuple[FoldedAdapter, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes [`~CalibrationReport.to_dict`] to a file."""
        write_json(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws every layer's error before and after, and the sensitivity ranking, to an image file.

        Raises:
            MissingExtraError: without matplotlib; says what to install.
        """
        figure_module = import_extra("matplotlib.figure", PLOT)
        panels = 2 if self.sensitivity else 1
        height = 1.5 + _ROW_HEIGHT * max(len(self.layers), len(self.sensitivity))
        figure = figure_module.Figure(figsize=(8 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _plot_errors(axes[0], self.layers)
        if self.sensitivity:
            _plot_sensitivity(axes[1], self.sensitivity)
        figure.suptitle(f"{self.bits_per_weight:.3f} bits per weight, {self.prompts} prompts")
        with new_file(path) as temporary:
            figure.savefig(temporary, format=pathlib.Path(path).suffix.removeprefix(".") or "png", dpi=120)

    def __rich__(self) -> Table:
        """The layers that matter most: by the denoiser's output if that was measured, else by their own error."""
        total = len(self.sensitivity or self.layers)
        caption = [f"{self.bits_per_weight:.3f} bits per weight"]
        for name, error in self.velocity_nmse.items():
            caption.append(f"{'embedding' if encodes_text(name) else 'velocity'} NMSE of {name} {error:.3g}")
        if total > _TABLE_ROWS:
            caption.append(f"{total - _TABLE_ROWS} more layers in the report")
        table = Table(caption="; ".join(caption), caption_justify="left")
        for heading in ("layer", "stored as", "bits"):
            table.add_column(heading, justify="right" if heading == "bits" else "left", overflow="fold")
        if self.sensitivity:
            table.title = "Sensitivity of the denoiser's output"
            base = next(iter(self.sensitivity[0].nmse))
            for heading in (f"NMSE as {base}", "NMSE as stored"):
                table.add_column(heading, justify="right")
            for layer in self.sensitivity[:_TABLE_ROWS]:
                bits = 8 * layer.bytes[layer.chosen] / (layer.shape[0] * layer.shape[1])
                errors = (f"{layer.worst:.2e}", f"{layer.nmse[layer.chosen]:.2e}")
                table.add_row(layer.name, layer.chosen, f"{bits:.2f}", *errors)
            return table
        table.title = "Largest errors of layers' outputs"
        for heading in ("rounded", "calibrated"):
            table.add_column(heading, justify="right")
        for row in sorted(self.layers, key=lambda row: -row.error)[:_TABLE_ROWS]:
            errors = (f"{row.error_rounded:.4f}", f"{row.error:.4f}")
            table.add_row(row.name, row.stored_as, f"{row.bits_per_weight:.2f}", *errors)
        return table


def _plot_errors(axes: Any, layers: Sequence[LayerReport]) -> None:
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


def _plot_sensitivity(axes: Any, layers: Sequence[LayerSensitivity]) -> None:
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
