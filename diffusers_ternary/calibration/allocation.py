# SPDX-License-Identifier: Apache-2.0
"""Spends a size budget: one candidate for every layer of all denoisers."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from .budget import Offer, SizeBudget, choose
from .candidates import Candidate
from .config import LEAST_ERROR
from .run import CalibrationRun


RunT = TypeVar("RunT")


class Allocation:
    """What the layers of all denoisers may take together.

    Args:
        runs (`Sequence[CalibrationRun]`): the denoisers.
        budget ([`SizeBudget`]): for all of them.
        how (`str`): the allocation of a [`CalibrationConfig`].

    Raises:
        ValueError: if even the smallest candidates do not fit, before hours of work; names the smallest possible size.
    """

    def __init__(self, runs: Sequence[CalibrationRun], budget: SizeBudget, how: str = LEAST_ERROR) -> None:
        self._runs, self._how = runs, how
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
        """Chooses within the budget, for every layer of the runs.

        Raises:
            ValueError: if the budget is so large that a denoiser would keep all its layers.
        """
        if self._how == LEAST_ERROR:
            self._leave_least_error()
        else:
            self._protect_ends()
        for run in self._runs:
            if run.chosen and all(candidate.kind == "keep" for candidate in run.chosen.values()):
                raise ValueError(
                    f"The size budget is large enough to keep every layer of {run.component}: there is nothing to "
                    "quantize. Set a smaller one."
                )

    def _leave_least_error(self) -> None:
        layers = [(run, name) for run in self._runs for name in run.candidates]
        offers = [
            [Offer(run.candidates[name][candidate], error) for candidate, error in run.sensitivities[name].items()]
            for run, name in layers
        ]
        for (run, name), index in zip(layers, choose(offers, self._capacity), strict=True):
            run.chosen[name] = list(run.candidates[name])[index]

    def _protect_ends(self) -> None:
        """Layers of the outermost blocks first; one that does not fit is passed over."""
        room = self._capacity - sum(
            run.candidates[name][chosen] for run in self._runs for name, chosen in run.chosen.items()
        )
        wide = Candidate("int8")
        for run, name in outermost_first([(run, run.blocks()) for run in self._runs]):
            offered = run.candidates[name]
            if wide not in offered:
                continue
            added = offered[wide] - offered[run.chosen[name]]
            if added <= room:
                run.chosen[name] = wide
                room -= added


def outermost_first(runs: Sequence[tuple[RunT, Sequence[Sequence[str]]]]) -> Iterator[tuple[RunT, str]]:
    """The layers of several denoisers, those of the blocks that are called first and last at the front.

    Args:
        runs (`Sequence[tuple[RunT, Sequence[Sequence[str]]]]`): each with its blocks in the order of their calls, and
            the layers of each block.
    """
    depth = max(len(blocks) for _, blocks in runs)
    for distance in range((depth + 1) // 2):
        for run, blocks in runs:
            ends = dict.fromkeys((distance, len(blocks) - 1 - distance))
            for index in ends:
                if distance <= index < len(blocks) - distance:
                    yield from ((run, name) for name in blocks[index])
