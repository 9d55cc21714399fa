# SPDX-License-Identifier: Apache-2.0
"""What a conversion found and wrote."""

import collections
import dataclasses
from typing import Any

from ..format import LayerSpec, TernarySpec
from ..ternarize import TernaryFit


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """One converted model.

    Args:
        name (`str`): the component of the pipeline, or empty for a single model.
        format (`str`): what the source was.
        layers (`dict[str, LayerSpec]`): packed layers.
        misfits (`dict[str, TernaryFit]`): layers that are not ternary and were kept.
        source_bytes (`int`): of the tensors as they were stored.
        bytes (`int`): of the tensors as they are stored now.
        packed_bytes (`int`): of these, what the packed layers take.
        verified (`bool`): whether what was written was read again and compared with the source.
    """

    name: str
    format: str
    layers: dict[str, LayerSpec]
    misfits: dict[str, TernaryFit]
    source_bytes: int
    bytes: int
    packed_bytes: int
    verified: bool

    @property
    def almost(self) -> dict[str, TernaryFit]:
        """Kept layers that are ternary for the most part: look at these."""
        return {name: fit for name, fit in self.misfits.items() if fit.almost}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per packed weight, scales included."""
        weights = sum(spec.weights for spec in self.layers.values())
        return 8 * self.packed_bytes / weights if weights else 0.0

    def summary(self) -> str:
        """A few lines for people."""
        sizes = collections.Counter(_grouping(spec) for spec in self.layers.values())
        kinds = ", ".join(f"{count} with {grouping}" for grouping, count in sizes.most_common())
        name = f"{self.name}: " if self.name else ""
        packed = f" ({kinds}) at {self.bits_per_weight:.3f} bits per weight" if self.layers else ""
        lines = [
            f"{name}{self.format}: {len(self.layers)} ternary layers packed{packed}; {len(self.misfits)} layers that "
            "are not ternary kept."
        ]
        if self.verified:
            lines.append("Read again and compared: every weight equals the source.")
        lines += [f"{name} is almost ternary ({fit}) and was kept." for name, fit in self.almost.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "name": self.name,
            "format": self.format,
            "layers": {name: spec.to_json() for name, spec in self.layers.items()},
            "misfits": {name: dataclasses.asdict(fit) for name, fit in self.misfits.items()},
            "source_bytes": self.source_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "verified": self.verified,
        }


def _grouping(spec: LayerSpec) -> str:
    if isinstance(spec, TernarySpec) and spec.groups > 1:
        return f"group size {spec.group_size}"
    return "one scale per row"
