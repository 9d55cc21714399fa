# SPDX-License-Identifier: Apache-2.0
"""How far a run has come; what a checkpoint keeps beside tensors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .guard import DivergenceGuard


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation.

    Args:
        step (`int`): updates before it.
        loss (`float`, *optional*): of the last update; `None` before the first.
        held_out (`float`): relative squared error of the prediction on held-out prompts.
    """

    step: int
    loss: float | None
    held_out: float


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        step (`int`): updates done, over all phases.
        phase (`int`): index of the phase.
        phase_step (`int`): updates done in it.
        loss (`float`, *optional*): of the last update.
        history (`tuple[Evaluation, ...]`): held-out evaluations.
        guard ([`DivergenceGuard`]): of the phase.
        seconds (`float`): wall time of the updates.
        cpu_seconds (`float`): CPU time of the updates, of this process.
        trained (`Mapping[str, int]`): phase → parameters that it trains.
        stopped (`str`, *optional*): why the run ended early.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    loss: float | None = None
    history: tuple[Evaluation, ...] = ()
    guard: DivergenceGuard = dataclasses.field(default_factory=DivergenceGuard)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trained: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stopped: str | None = None

    @property
    def best(self) -> Evaluation:
        """The evaluation with the lowest held-out error."""
        return min(self.history, key=lambda entry: math.inf if math.isnan(entry.held_out) else entry.held_out)

    @property
    def best_error(self) -> float:
        """The lowest held-out error; infinite before the first evaluation."""
        return self.best.held_out if self.history else math.inf

    def advanced(self, *, loss: float, seconds: float, cpu_seconds: float) -> "Progress":
        """After one more update."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            phase_step=self.phase_step + 1,
            loss=loss,
            seconds=self.seconds + seconds,
            cpu_seconds=self.cpu_seconds + cpu_seconds,
        )

    def evaluated(self, error: float) -> "Progress":
        """After an evaluation."""
        return dataclasses.replace(self, history=(*self.history, Evaluation(self.step, self.loss, error)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an error that is not finite becomes `None`."""
        values = dataclasses.asdict(self)
        for entry in values["history"]:
            entry["held_out"] = entry["held_out"] if math.isfinite(entry["held_out"]) else None
        return {**values, "history": list(values["history"]), "guard": self.guard.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        """Reads what `to_dict` made."""
        history = tuple(
            Evaluation(e["step"], e["loss"], math.nan if e["held_out"] is None else e["held_out"])
            for e in values["history"]
        )
        return cls(**{**values, "history": history, "guard": DivergenceGuard.from_dict(values["guard"])})
