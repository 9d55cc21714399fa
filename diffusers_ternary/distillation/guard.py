# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose loss explodes."""

import dataclasses
import math
from typing import Any


_MEMORY = 0.95  # of the running mean: about twenty steps
_EXPLOSION = 4.0
_PATIENCE = 10


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

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "lowest": None if math.isinf(self.lowest) else self.lowest}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DivergenceGuard":
        """Reads what `to_dict` made."""
        return cls(**{**values, "lowest": math.inf if values["lowest"] is None else values["lowest"]})
