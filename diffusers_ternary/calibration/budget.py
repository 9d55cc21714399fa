# SPDX-License-Identifier: Apache-2.0
"""A size for the whole model, and the choice for every layer that keeps to it with the least error."""

import dataclasses
import math
import re
from collections.abc import Sequence

import torch

from ..files import parse_size


# Steps that the room above the smallest choice is divided into: bounds memory and time of the search.
_STEPS = 1 << 16
_BITS = re.compile(r"\s*(\d{1,9}(?:\.\d+)?)\s*bits?\s*")


@dataclasses.dataclass(frozen=True)
class SizeBudget:
    """How large a model may be: bits per weight of the layers that may be converted, or bytes of all its weights.

    Args:
        bits (`float`, *optional*): stored bits per weight, scales and low-rank corrections included; layers that the
            budget decides to keep count with what they take.
        bytes (`int`, *optional*): of all weights of the denoisers, converted or not, without the headers of the files.
    """

    bits: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: int | str) -> "SizeBudget":
        """Reads `"2.0 bits"`, `"400MB"`, `"1.2 GiB"`, or a number of bytes.

        Raises:
            ValueError: for anything else, and for a size that is not positive.
        """
        budget = cls._parse(value)
        if budget is None or not (budget.bits or budget.bytes or 0) > 0:
            raise ValueError(f"size_budget={value!r} is not a positive size such as '2.0 bits' or '400MB'.")
        return budget

    @classmethod
    def _parse(cls, value: int | str) -> "SizeBudget | None":
        bits = _BITS.fullmatch(value) if isinstance(value, str) else None
        if bits:
            return cls(bits=float(bits[1]))
        try:
            return cls(bytes=parse_size(value, name="size_budget"))
        except ValueError:
            return None

    def layer_bytes(self, *, weights: int, rest: int) -> int:
        """What the layers may take together.

        Args:
            weights (`int`): weights in the layers.
            rest (`int`): bytes of everything else in the denoisers.
        """
        if self.bits is not None:
            return math.floor(self.bits * weights / 8 + 1e-6)  # 2.1 bits of 80 weights are 21 bytes, not 20.99...
        assert self.bytes is not None
        return self.bytes - rest

    def describe(self, layer_bytes: int, *, weights: int, rest: int) -> str:
        """A size of the layers in the words of the budget."""
        if self.bits is not None:
            return f"{math.ceil(8e4 * layer_bytes / weights) / 1e4:g} bits"  # rounded up: it has to be enough
        return f"{layer_bytes + rest} bytes ({(layer_bytes + rest) / 1e6:,.2f} MB)"


@dataclasses.dataclass(frozen=True)
class Offer:
    """What one way to store a layer costs, and the error it leaves.

    Args:
        bytes (`int`): stored.
        error (`float`): not negative; the errors of all layers add up.
    """

    bytes: int
    error: float


def choose(offers: Sequence[Sequence[Offer]], capacity: int) -> list[int]:
    """Takes one offer per layer so that the bytes fit into `capacity` and the sum of the errors is least.

    A multiple-choice knapsack, as in MixDQ (Zhao et al., arXiv 2405.17873), solved by dynamic programming over the
    bytes above the smallest choice, in steps of 1/65536 of the room there is. Costs are rounded up to steps, so the
    result always fits; it is the optimum where a step is one byte, and else of a capacity that is smaller by at most
    one step per layer.

    Args:
        offers (`Sequence[Sequence[Offer]]`): for each layer, at least one.
        capacity (`int`): bytes for all layers.

    Returns:
        `list[int]`: for each layer, the position of its offer.

    Raises:
        ValueError: if not even the smallest offers fit.
    """
    smallest = [min(offer.bytes for offer in layer) for layer in offers]
    room = capacity - sum(smallest)
    if room < 0:
        raise ValueError(f"The smallest offers take {sum(smallest)} bytes, more than {capacity}.")
    wanted = [min(range(len(layer)), key=lambda i: (layer[i].error, layer[i].bytes)) for layer in offers]
    if sum(layer[index].bytes for layer, index in zip(offers, wanted, strict=True)) <= capacity:
        return wanted
    step = max(1, math.ceil(room / _STEPS))
    width = room // step + 1
    best = torch.zeros(width, dtype=torch.float64)  # least error of the layers so far, by steps they may take
    taken = []
    for layer, least in zip(offers, smallest, strict=True):
        reached = torch.full((len(layer), width), math.inf, dtype=torch.float64)
        for index, offer in enumerate(layer):
            cost = -(-(offer.bytes - least) // step)
            if cost < width:
                reached[index, cost:] = best[: width - cost] + offer.error
        best, index_of = reached.min(dim=0)
        taken.append(index_of.to(torch.int16))
    position = width - 1
    choice = []
    for layer, least, index_of in zip(reversed(offers), reversed(smallest), reversed(taken), strict=True):
        index = int(index_of[position])
        choice.append(index)
        position -= -(-(layer[index].bytes - least) // step)
    return choice[::-1]
