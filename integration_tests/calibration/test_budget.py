# SPDX-License-Identifier: Apache-2.0
"""Size budgets: how they are read, and the choice against a search of all combinations."""

import itertools
import random

import pytest

from diffusers_ternary.calibration import CalibrationConfig
from diffusers_ternary.calibration.budget import Offer, SizeBudget, choose


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        ("2.0 bits", SizeBudget(bits=2.0)),
        ("1.9bits", SizeBudget(bits=1.9)),
        ("2 bit", SizeBudget(bits=2.0)),
        ("400 MB", SizeBudget(bytes=400_000_000)),
        ("400MB", SizeBudget(bytes=400_000_000)),
        ("1.5GiB", SizeBudget(bytes=3 * 2**29)),
        (12345, SizeBudget(bytes=12345)),
    ],
)
def test_reads(value, budget):
    assert SizeBudget.parse(value) == budget


@pytest.mark.parametrize("value", ["", "bits", "-2 bits", "0 bits", "two bits", "lots", 0, -1, True, 2.0, None, "0MB"])
def test_refuses(value):
    with pytest.raises(ValueError, match=r"not a positive size such as '2\.0 bits' or '400MB'"):
        SizeBudget.parse(value)


def test_the_config_refuses_it_too():
    with pytest.raises(ValueError, match="size_budget='lots'"):
        CalibrationConfig(size_budget="lots")


def test_bytes_of_the_layers():
    assert SizeBudget(bits=2.0).layer_bytes(weights=1000, rest=77) == 250
    assert SizeBudget(bits=2.1).layer_bytes(weights=80, rest=0) == 21, "no byte is lost to binary fractions"
    assert SizeBudget(bytes=1000).layer_bytes(weights=1, rest=77) == 923


def random_offers(rng: random.Random, layers: int) -> list[list[Offer]]:
    return [[Offer(rng.randrange(1, 40), rng.random()) for _ in range(rng.randrange(1, 5))] for _ in range(layers)]


def cost(offers: list[list[Offer]], choice: list[int]) -> tuple[int, float]:
    taken = [layer[index] for layer, index in zip(offers, choice, strict=True)]
    return sum(offer.bytes for offer in taken), sum(offer.error for offer in taken)


@pytest.mark.parametrize("seed", range(30))
def test_is_the_best_of_all_combinations(seed):
    rng = random.Random(seed)
    offers = random_offers(rng, 5)
    least = sum(min(offer.bytes for offer in layer) for layer in offers)
    capacity = least + rng.randrange(60)
    combinations = [cost(offers, list(c)) for c in itertools.product(*(range(len(layer)) for layer in offers))]
    best = min(error for size, error in combinations if size <= capacity)
    size, error = cost(offers, choose(offers, capacity))
    assert size <= capacity
    assert error == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_large_sizes_fit_and_come_close(seed):
    """Steps of more than a byte: within the capacity, and no worse than the optimum of a slightly smaller one."""
    rng = random.Random(seed)
    small = random_offers(rng, 40)
    unit = 1_000_003
    large = [[Offer(offer.bytes * unit, offer.error) for offer in layer] for layer in small]
    capacity = sum(min(offer.bytes for offer in layer) for layer in small) + 150
    size, error = cost(large, choose(large, capacity * unit))
    assert size <= capacity * unit
    assert error <= cost(small, choose(small, capacity - 1))[1] + 1e-12


def test_room_for_everything_takes_the_least_errors():
    offers = [[Offer(1, 0.5), Offer(9, 0.0)], [Offer(2, 0.3), Offer(5, 0.1), Offer(9, 0.2)]]
    assert choose(offers, 10**9) == [1, 1]


def test_no_room_takes_the_smallest():
    offers = [[Offer(3, 0.0), Offer(1, 0.5)], [Offer(2, 0.3), Offer(5, 0.1)]]
    assert choose(offers, 3) == [1, 0]


def test_an_impossible_capacity_is_refused():
    with pytest.raises(ValueError, match="take 3 bytes, more than 2"):
        choose([[Offer(1, 0.0)], [Offer(2, 0.0)]], 2)
