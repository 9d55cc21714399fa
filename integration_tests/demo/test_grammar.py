# SPDX-License-Identifier: Apache-2.0
"""The pixel-people grammar: prompts and attributes are the same thing, and the hold-out holds."""

import itertools
import random
import subprocess
import sys

import pytest

from diffusers_ternary.demo.grammar import (
    ATTRIBUTES,
    HELD_OUT_KEY,
    Portrait,
    attributes_of,
    caption,
    held_out_prompts,
    phrases,
    prompt_of,
    sample_portraits,
    training_prompts,
)


EXAMPLE = Portrait(
    expression="smiling",
    hair_style="long",
    hair_color="red",
    skin="tan",
    eyewear="no glasses",
    hat="cap",
    shirt_pattern="striped",
    shirt_color="green",
    background="pink",
)


def key_of(prompt: str) -> tuple[str | None, ...]:
    """The combination that decides about the hold-out, read from a prompt."""
    found = attributes_of(prompt)
    return tuple(found.get(name) for name in HELD_OUT_KEY)


def test_the_prompt_of_a_portrait_reads_as_documented() -> None:
    assert prompt_of(EXAMPLE) == (
        "smiling person, long red hair, tan skin, no glasses, cap, striped green shirt, pink background"
    )


@pytest.mark.parametrize("held_out", [True, False])
def test_every_prompt_reads_back_as_its_portrait(held_out: bool) -> None:
    for portrait in sample_portraits(500, 11, held_out=held_out):
        assert attributes_of(prompt_of(portrait)) == portrait.labels()


@pytest.mark.parametrize("seed", [0, 1])
def test_captions_say_nothing_wrong_and_may_say_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = set()
    for portrait in sample_portraits(300, seed, held_out=False):
        said = attributes_of(caption(portrait, rng))
        assert said.items() <= portrait.labels().items()
        lengths.add(len(said))
    assert 0 in lengths
    assert max(lengths) == len(ATTRIBUTES)


def test_phrases_may_come_in_any_order() -> None:
    rng = random.Random(0)
    parts = list(phrases(EXAMPLE))
    for _ in range(20):
        rng.shuffle(parts)
        assert attributes_of(", ".join(parts)) == EXAMPLE.labels()


def test_no_held_out_combination_is_ever_a_training_combination() -> None:
    training = {key_of(prompt) for prompt in training_prompts(4000, 3)}
    held_out = {key_of(prompt) for prompt in held_out_prompts(4000, 3)}
    assert not training & held_out
    assert 0.10 < len(held_out) / len(training | held_out) < 0.20


def test_every_pair_of_values_in_a_held_out_combination_was_trained_on() -> None:
    # the hold-out tests new combinations, not new words: a pair that was never seen would be another test
    def pairs(prompts: list[str]) -> set[tuple]:
        return {
            pair
            for prompt in prompts
            for pair in itertools.combinations(zip(HELD_OUT_KEY, key_of(prompt), strict=True), 2)
        }

    assert pairs(held_out_prompts(2000, 0)) <= pairs(training_prompts(8000, 0))


def test_the_split_does_not_depend_on_the_process() -> None:
    code = (
        "from diffusers_ternary.demo.grammar import held_out_prompts, training_prompts;"
        "print(held_out_prompts(5, 4) + training_prompts(5, 4))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip().splitlines()[-1] == str(held_out_prompts(5, 4) + training_prompts(5, 4))


def test_seeds_give_different_prompts_and_the_same_seed_the_same() -> None:
    assert held_out_prompts(20, 0) == held_out_prompts(20, 0)
    assert held_out_prompts(20, 0) != held_out_prompts(20, 1)
    assert held_out_prompts(20, 0) == held_out_prompts(40, 0)[:20]


def test_every_value_of_every_attribute_is_asked_for() -> None:
    asked = {item for prompt in held_out_prompts(3000, 0) for item in attributes_of(prompt).items()}
    assert asked == {(name, value) for name, values in ATTRIBUTES.items() for value in values}


def test_what_cannot_be_seen_is_never_asked_for() -> None:
    for portrait in sample_portraits(2000, 0, held_out=False):
        assert portrait.hair_style in ("short", "long", "bald") or portrait.hat == "no hat"
        assert (portrait.hair_color is None) == (portrait.hair_style == "bald")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skin": "silver"}, "skin='silver'"),
        ({"hair_style": "bald"}, "no hair color"),
        ({"hair_color": None}, "every other style has one"),
        ({"hair_style": "mohawk"}, "would hide the hair"),
    ],
)
def test_impossible_portraits_are_refused(change: dict[str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Portrait(**{**vars(EXAMPLE), **change})


@pytest.mark.parametrize("phrase", ["a dragon", "smiling dog", "long hair", "plain gold shirt", "hat", "red cap"])
def test_phrases_outside_the_grammar_are_named_in_the_error(phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        attributes_of(f"tan skin, {phrase}")


def test_an_attribute_mentioned_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="mentions skin twice"):
        attributes_of("tan skin, dark skin")
