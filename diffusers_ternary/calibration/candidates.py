# SPDX-License-Identifier: Apache-2.0
"""The ways a layer can be stored, of which a size budget takes one per layer."""

import dataclasses

import torch

from ..backend import file_bytes
from ..backend.config import TernaryConfig
from ..format import Int8Spec, LayerSpec, TernarySpec
from .config import PROTECTED_ENDS, CalibrationConfig


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Args:
        kind (`str`): `"ternary"`, `"int8"` or `"keep"`.
        group_size (`int`, *optional*): columns per scale of ternary codes; `None` = one scale per row.
        rank (`int`): of the low-rank correction of ternary codes; 0 = none.
    """

    kind: str = "ternary"
    group_size: int | None = None
    rank: int = 0

    @property
    def label(self) -> str:
        """A short name, for tables and files: `g128`, `g64-r16`, `row`, `int8`, `keep`."""
        if self.kind != "ternary":
            return self.kind
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"{group}-r{self.rank}" if self.rank else group

    def spec(self, weight: torch.Tensor, config: TernaryConfig, *, column_scales: bool = False) -> LayerSpec | None:
        """What is stored for a float weight `[N, ...]`, with the scales and rotation of a config; `None` = kept."""
        rows, columns = weight.flatten(1).shape
        if self.kind == "keep":
            return None
        if self.kind == "int8":
            return Int8Spec(rows, columns)
        own = {"group_size": self.group_size, "rank": self.rank}
        spec = TernarySpec.for_matrix(rows, columns, **{**config.spec_options, **own})
        return dataclasses.replace(spec, column_scales=column_scales)


def base_candidate(config: TernaryConfig) -> Candidate:
    """How the config stores a ternary layer."""
    return Candidate(group_size=config.group_size, rank=config.rank)


def candidates_for(
    weight: torch.Tensor, config: TernaryConfig, calibration: CalibrationConfig
) -> dict[Candidate, int]:
    """The candidates of a layer with the most bytes that they may take in a file, the config's own first.

    Those that store the same as an earlier one are left out, and so is what is smaller than the config's own: a group
    size above it would be, but is not what was asked for.
    """
    base = base_candidate(config)
    settings = calibration.sensitivity
    found = [base]
    if calibration.allocation == PROTECTED_ENDS:
        found += [Candidate("int8")]
    elif calibration.size_budget is not None and settings is not None:
        found += [dataclasses.replace(base, group_size=size) for size in settings.group_sizes]
        found += [dataclasses.replace(base, rank=base.rank + rank) for rank in settings.ranks]
        found += [Candidate("int8")] if settings.int8 else []
        found += [Candidate("keep")]
    specs: dict[LayerSpec | None, Candidate] = {}
    for candidate in found:
        spec = candidate.spec(weight, config, column_scales=calibration.solver.column_scales)
        specs.setdefault(spec, candidate)
    sizes = {candidate: stored_bytes(spec, weight) for spec, candidate in specs.items()}
    return {candidate: size for candidate, size in sizes.items() if candidate.kind == "keep" or size >= sizes[base]}


def stored_bytes(spec: LayerSpec | None, weight: torch.Tensor) -> int:
    """Bytes that stand for a float weight in a file; without a spec, its own."""
    return weight.numel() * weight.element_size() if spec is None else file_bytes(spec)
