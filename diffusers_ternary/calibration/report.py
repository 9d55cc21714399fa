# SPDX-License-Identifier: Apache-2.0
"""What a calibration did, layer by layer."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..files import write_json
from .report_plot import plot_report
from .report_table import report_table


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

    @property
    def stored_as(self) -> str:
        """Group size, scale layout, rotation and rank, in short."""
        rotation = f" rotated {self.hadamard}" if self.hadamard else ""
        return f"g{self.group_size} {self.scales}{rotation}" + (f" r{self.rank}" if self.rank else "")


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
            the sensitivity was measured on; empty if it was not measured.
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
        plot_report(self, path)

    def __rich__(self) -> Table:
        return report_table(self)
