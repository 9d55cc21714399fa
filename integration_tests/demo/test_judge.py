# SPDX-License-Identifier: Apache-2.0
"""The judge: right about real pictures it has never seen, and an honest counter."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ternary.demo import AttributeAccuracy, Judge, attribute_accuracy, attributes_of, real_images
from diffusers_ternary.demo.grammar import ATTRIBUTES, held_out_prompts, prompt_of, sample_portraits


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_package()


@pytest.fixture(scope="module")
def score(judge: Judge) -> AttributeAccuracy:
    real = real_images()
    return judge.attribute_accuracy(real.images, real.prompts)


def test_the_real_images_are_held_out_and_fully_labeled() -> None:
    real = real_images()
    assert real.images.shape == (512, 16, 16, 3)
    assert real.images.dtype == np.uint8
    assert list(real.prompts) == held_out_prompts(512, 0)


def test_the_judge_is_right_about_every_attribute_of_real_images(score: AttributeAccuracy) -> None:
    assert set(score.per_attribute) == set(ATTRIBUTES)
    assert min(score.per_attribute.values()) >= 0.98, score
    assert score.all_attributes >= 0.95, score
    assert score.count == 512


def test_the_judge_is_right_about_every_value_of_every_attribute(judge: Judge) -> None:
    real = real_images()
    hits: dict[tuple[str, str], list[bool]] = {}
    for seen, prompt in zip(judge.classify(real.images), real.prompts, strict=True):
        for name, value in attributes_of(prompt).items():
            hits.setdefault((name, value), []).append(seen[name] == value)
    recall = {key: sum(values) / len(values) for key, values in hits.items()}
    assert min(recall.values()) >= 0.9, sorted(recall.items(), key=lambda item: item[1])[:3]


def test_wrong_prompts_score_near_chance(judge: Judge) -> None:
    real = real_images()
    score = judge.attribute_accuracy(real.images, real.prompts[1:] + real.prompts[:1])
    assert score.mean < 0.35
    assert score.all_attributes == 0.0


def test_noise_is_not_a_portrait(judge: Judge) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 16, 16, 3), dtype=np.uint8)
    score = judge.attribute_accuracy(noise, held_out_prompts(256, 1))
    assert score.mean < 0.4
    assert score.all_attributes == 0.0


def test_the_count_agrees_with_a_count_by_hand(judge: Judge) -> None:
    real = real_images()
    portraits = sample_portraits(40, 0, held_out=True)
    images = real.images[:40]
    prompts = [prompt_of(portrait) for portrait in portraits]
    swapped = [*prompts[:30], *(", ".join(reversed(prompt.split(", "))) for prompt in prompts[30:])]
    seen = judge.classify(images)
    by_hand = {
        name: [
            seen[i][name] == getattr(portrait, name)
            for i, portrait in enumerate(portraits)
            if getattr(portrait, name) is not None
        ]
        for name in ATTRIBUTES
    }
    expected = {name: float(np.mean(hits)) for name, hits in by_hand.items()}
    score = judge.attribute_accuracy(images, swapped)
    assert score.per_attribute == pytest.approx(expected)
    assert score.mean == pytest.approx(np.mean(list(expected.values())))


def test_an_attribute_that_the_prompt_does_not_mention_is_not_counted(judge: Judge) -> None:
    images = real_images().images[:1]
    truth = attributes_of(real_images().prompts[0])
    other_skin = next(skin for skin in ATTRIBUTES["skin"] if skin != truth["skin"])
    right = judge.attribute_accuracy(images, [f"{truth['expression']} person"])
    assert dict(right.per_attribute) == {"expression": 1.0}
    assert (right.mean, right.all_attributes) == (1.0, 1.0)
    half = judge.attribute_accuracy(images, [f"{truth['expression']} person, {other_skin} skin"])
    assert dict(half.per_attribute) == {"expression": 1.0, "skin": 0.0}
    assert (half.mean, half.all_attributes) == (0.5, 0.0)


def test_every_form_of_the_same_images_scores_the_same(judge: Judge) -> None:
    real = real_images()
    array, prompts = real.images[:32], list(real.prompts[:32])
    floats = array.astype(np.float32) / 255.0
    forms = [
        array,
        floats,
        torch.from_numpy(floats).movedim(-1, 1),
        [Image.fromarray(image) for image in array],
    ]
    scores = [judge.attribute_accuracy(form, prompts) for form in forms]
    assert all(score == scores[0] for score in scores)
    assert attribute_accuracy(array, prompts) == scores[0]


def test_the_result_is_frozen(score: AttributeAccuracy) -> None:
    with pytest.raises(FrozenInstanceError):
        score.mean = 1.0  # type: ignore[misc]


def test_enlarged_images_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"\(3, 64, 64\).*do not resize"):
        judge.attribute_accuracy(np.zeros((1, 64, 64, 3), np.uint8), ["tan skin"])


def test_images_and_prompts_must_match(judge: Judge) -> None:
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        judge.attribute_accuracy(np.zeros((2, 16, 16, 3), np.uint8), ["tan skin"])
    with pytest.raises(ValueError, match="mentions no attribute"):
        judge.attribute_accuracy(np.zeros((1, 16, 16, 3), np.uint8), [""])
