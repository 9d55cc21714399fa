# SPDX-License-Identifier: Apache-2.0
"""How far a run has come, and whether it may go on; what a checkpoint keeps beside tensors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


_MEMORY = 0.95  # of the running mean: about twenty steps
_EXPLOSION = 4.0
_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation.

    Args:
        step (`int`): updates before it.
        loss (`float`, *optional*): of the last update; `None` before the first.
        held_out (`float`): relative squared error of the prediction on held-out prompts.
        cpu_seconds (`float`): of the updates before it; not compared, since no two runs take the same.
    """

    step: int
    loss: float | None
    held_out: float
    cpu_seconds: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass
class DivergenceGuard:
    """Watches the loss of a phase.

    A run has diverged when a loss is not finite, or when the running mean stays above four times the lowest it has
    been for ten steps. Learning rates that are merely too high double the loss before it falls again.

    Args:
        mean (`float`, *optional*): running mean of the loss.
        lowest (`float`): lowest running mean so far.
        above (`int`): consecutive steps above the limit.
    """

    mean: float | None = None
    lowest: float = math.inf
    above: int = 0

    def update(self, loss: float) -> str | None:
        """Takes the loss of a step; returns why the run has diverged, or `None`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self.mean = loss if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * loss
        self.lowest = min(self.lowest, self.mean)
        self.above = self.above + 1 if self.mean > _EXPLOSION * self.lowest else 0
        if self.above >= _PATIENCE:
            return f"the loss rose to {self.mean:.4g}, from {self.lowest:.4g} at its best"
        return None


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Args:
        step (`int`): updates done, over all phases.
        phase (`int`): index of the phase.
        phase_step (`int`): updates done in it.
        loss (`float`, *optional*): of the last update.
        history (`list[Evaluation]`): held-out evaluations.
        guard ([`DivergenceGuard`]): of the phase.
        seconds (`float`): wall time of the updates.
        cpu_seconds (`float`): CPU time of the updates, of this process.
        trained (`dict[str, int]`): phase → parameters that it trains.
        stopped (`str`, *optional*): why the run ended early.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    loss: float | None = None
    history: list[Evaluation] = dataclasses.field(default_factory=list)
    guard: DivergenceGuard = dataclasses.field(default_factory=DivergenceGuard)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trained: dict[str, int] = dataclasses.field(default_factory=dict)
    stopped: str | None = None

    @property
    def best(self) -> Evaluation:
        """The evaluation with the lowest held-out error."""
        return min(self.history, key=lambda entry: math.inf if math.isnan(entry.held_out) else entry.held_out)

    def start_phase(self, number: int) -> None:
        """Begins a phase."""
        self.phase, self.phase_step, self.guard = number, 0, DivergenceGuard()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        """Reads what `dataclasses.asdict` made, also as JSON."""
        history = [Evaluation(**entry) for entry in values["history"]]
        return cls(**{**values, "history": history, "guard": DivergenceGuard(**values["guard"])})
