# SPDX-License-Identifier: Apache-2.0
"""Spends a size budget: one candidate for every layer of all denoisers."""

from collections.abc import Sequence

from .budget import Offer, SizeBudget, choose
from .run import CalibrationRun


class Allocation:
    """What the layers of all denoisers may take together.

    Args:
        runs (`Sequence[CalibrationRun]`): the denoisers.
        budget ([`SizeBudget`]): for all of them.

    Raises:
        ValueError: if even the smallest candidates do not fit, before hours of work; names the smallest possible size.
    """

    def __init__(self, runs: Sequence[CalibrationRun], budget: SizeBudget) -> None:
        self._runs = runs
        sizes = {"weights": sum(run.weights for run in runs), "rest": sum(run.other_bytes for run in runs)}
        fixed = sum(run.fixed_bytes for run in runs)
        least = fixed + sum(min(offered.values()) for run in runs for offered in run.candidates.values())
        capacity = budget.layer_bytes(**sizes)
        if least > capacity:
            raise ValueError(
                f"The size budget, {budget.describe(capacity, **sizes)}, is below the smallest possible, "
                f"{budget.describe(least, **sizes)}, with all layers ternary. Allow more, or set a larger group_size."
            )
        self._capacity = capacity - fixed

    def spend(self) -> None:
        """Chooses what leaves the least sum of errors within the budget, for every layer of the runs.

        Raises:
            ValueError: if the budget is so large that a denoiser would keep all its layers.
        """
        layers = [(run, name) for run in self._runs for name in run.candidates]
        offers = [
            [Offer(run.candidates[name][candidate], error) for candidate, error in run.sensitivities[name].items()]
            for run, name in layers
        ]
        for (run, name), index in zip(layers, choose(offers, self._capacity), strict=True):
            run.chosen[name] = list(run.candidates[name])[index]
        for run in self._runs:
            if run.chosen and all(candidate.kind == "keep" for candidate in run.chosen.values()):
                raise ValueError(
                    f"The size budget is large enough to keep every layer of {run.component}: there is nothing to "
                    "quantize. Set a smaller one."
                )
