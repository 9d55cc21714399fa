# SPDX-License-Identifier: Apache-2.0
"""The prompts of Scenes: the split, the wordings, and reading them back."""

import random

import pytest

from diffusers_ternary.evaluation.geneval import TASKS, Requirement
from diffusers_ternary.evaluation.scenes.prompts import (
    COMPOSED,
    benchmark_tasks,
    combinations_of,
    held_out_combination,
    is_held_out,
    make_task,
    read_task,
    training_task,
    tuning_prompts,
)
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES, COLORS, NUMBERS, PLURALS


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(5)
    return [training_task(tag, rng) for tag in (*TASKS, COMPOSED) for _ in range(700)]


def test_no_training_prompt_has_a_held_out_combination(drawn):
    combinations = {combination for task in drawn for combination in combinations_of(task.include)}
    assert len(combinations) > 1000  # of 1300 with the held-out ones
    assert not [combination for combination in combinations if held_out_combination(combination)]


def test_every_word_is_in_training(drawn):
    words = {word for task in drawn for word in task.prompt.split()}
    assert {*CLASSES, *COLORS, *PLURALS.values(), *NUMBERS[1:], "left", "right", "above", "below"} <= words


def test_the_split_leaves_a_share_of_every_kind_of_combination_out():
    colored = [f"{color} {name}" for color in COLORS for name in CLASSES]
    pairs = [f"{a} + {b}" for a in CLASSES for b in CLASSES if a < b]
    numbers = [f"{count} {name}" for count in (2, 3, 4) for name in CLASSES]
    for combinations, wanted in ((colored, 0.15), (pairs, 0.15), (numbers, 0.3)):
        share = sum(map(held_out_combination, combinations)) / len(combinations)
        assert abs(share - wanted) < 0.06
    for name in CLASSES:  # no class is known in a few colors only
        assert sum(held_out_combination(f"{color} {name}") for color in COLORS) <= 5
        assert sum(held_out_combination(f"{count} {name}") for count in (2, 3, 4)) <= 2


def test_benchmark_prompts_are_held_out_and_take_turns():
    tasks = benchmark_tasks(120, 3)
    assert [task.tag for task in tasks] == list(TASKS) * 20
    assert all(is_held_out(task) for task in tasks if task.tag != "single_object")
    assert tasks == benchmark_tasks(120, 3)
    assert tasks != benchmark_tasks(120, 4)
    assert not any(is_held_out(task) for task in benchmark_tasks(120, 3, held_out=False))
    assert all(task.include[0].count in (2, 3, 4) for task in tasks if task.tag == "counting")


@pytest.mark.parametrize(
    ("tag", "include", "prompt"),
    [
        ("single_object", (Requirement("guitar"),), "a photo of a guitar"),
        ("single_object", (Requirement("umbrella"),), "a photo of an umbrella"),
        ("two_object", (Requirement("cat"), Requirement("rocket")), "a photo of a cat and a rocket"),
        ("counting", (Requirement("cactus", 3),), "a photo of three cacti"),
        ("colors", (Requirement("car", color="orange"),), "a photo of an orange car"),
        (
            "position",
            (Requirement("key"), Requirement("dog", position=("right of", 0))),
            "a photo of a dog right of a key",
        ),
        (
            "color_attr",
            (Requirement("bell", color="red"), Requirement("bus", color="blue")),
            "a photo of a red bell and a blue bus",
        ),
    ],
)
def test_prompts_are_worded_as_in_geneval(tag, include, prompt):
    task = make_task(tag, include)
    assert task.prompt == prompt
    assert read_task(prompt) == task


def test_counting_excludes_one_more():
    assert make_task("counting", (Requirement("key", 2),)).exclude == (Requirement("key", 3),)


def test_every_wording_is_read_back(drawn):
    for task in drawn:
        read = read_task(task.prompt)
        assert read is not None, task.prompt
        assert read.include == task.include, task.prompt
        if task.tag != COMPOSED:
            assert (read.tag, read.exclude) == (task.tag, task.exclude)


def test_a_users_own_prompt():
    task = read_task("A red cat to the left of two blue keys.")
    assert task.include == (
        Requirement("key", 2, "blue"),
        Requirement("cat", 1, "red", position=("left of", 0)),
    )
    assert task.tag == COMPOSED


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a zebra",
        "a crimson cat",
        "two key",
        "a keys",
        "a cat and a dog and a bus",
        "a cat and a cat",
        "three cats and two dogs",
        "a cat behind a dog",
    ],
)
def test_prompts_outside_the_grammar_are_not_scored(prompt):
    assert read_task(prompt) is None


def test_tuning_prompts_are_none_of_the_benchmarks():
    tuning = tuning_prompts(700, 0)
    assert len(tuning) == 700
    assert tuning == tuning_prompts(700, 0) != tuning_prompts(700, 1)
    tasks = [read_task(prompt) for prompt in tuning]
    assert all(task is not None and not is_held_out(task) for task in tasks)
    assert {task.tag for task in tasks} == {*TASKS, COMPOSED}
    # 40 single objects, each in GenEval's wording, are all that the benchmark asks for without a combination.
    asked = {task.prompt for seed in range(3) for task in benchmark_tasks(553, seed)}
    assert not asked & set(tuning)
