# SPDX-License-Identifier: Apache-2.0
"""The judge of Scenes: a detector that finds what was drawn, and nothing where pictures and prompts do not match."""

import random

import pytest
import torch
from PIL import Image

from diffusers_ternary.evaluation.scenes.detector import STRIDE, Detector, cell_centers, overlap, to_pictures
from diffusers_ternary.evaluation.scenes.files import JUDGE, scenes_file
from diffusers_ternary.evaluation.scenes.prompts import benchmark_tasks
from integration_tests.support.scenes import examples


renderer = examples("renderer")
train_judge = examples("train_judge")


@pytest.fixture(scope="module")
def judge():
    return Detector.from_file(scenes_file(JUDGE))


@pytest.fixture(scope="module")
def scenes():
    tasks, sprites = benchmark_tasks(240, 7), renderer.Sprites()
    layout = renderer.layout_of(tasks, sprites, random.Random(7), training=False)
    return tasks, layout, renderer.Renderer(sprites).draw(layout)


def test_the_judge_is_right_on_held_out_scenes(judge, scenes):
    tasks, _, pictures = scenes
    scores = train_judge.judge_pictures(judge, pictures, tasks)
    assert scores.overall >= 0.985
    assert min(scores.per_task.values()) >= 0.95
    assert set(scores.counts.values()) == {40}


def test_the_judge_falls_to_chance_with_the_prompts_of_others(judge, scenes):
    tasks, _, pictures = scenes
    scores = train_judge.judge_pictures(judge, pictures.roll(6 * 5, 0), tasks)
    assert scores.overall < 0.06


def test_boxes_are_within_a_pixel_or_two(judge, scenes):
    _, layout, pictures = scenes
    truth = renderer.boxes_of(layout, renderer.Sprites())
    overlaps = []
    for scene, found in enumerate(judge.detect(pictures[:60])):
        boxes = truth[scene][layout.objects[scene, :, 0] != renderer.NOTHING].tolist()
        overlaps += [max(overlap(box, detection.box) for box in boxes) for detection in found]
    assert sum(overlaps) / len(overlaps) > 0.85


def test_a_spoiled_object_is_none(judge):
    """Two silhouettes on top of each other are neither: a malformed object must not count."""
    rng, sprites = random.Random(3), renderer.Sprites()
    tasks = [task for task in benchmark_tasks(600, 9) if task.tag == "single_object"]
    layout = renderer.layout_of(tasks, sprites, rng, training=False)
    objects = layout.objects.clone()
    objects[:, 1] = objects[:, 0]
    objects[:, 1, 0] = (objects[:, 0, 0] + torch.randint(1, 40, (len(tasks),))) % 40
    pictures = renderer.Renderer(sprites).draw(renderer.Layout(objects, layout.background))
    kept = sum(bool(found) for found in judge.detect(pictures))
    assert kept < 0.6 * len(tasks)  # some silhouettes lie within others


def test_overlap_of_boxes():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0


def test_cells_are_centered_on_their_pixels():
    centers = cell_centers(torch.device("cpu"))
    assert centers.shape == (2, 16, 16)
    assert centers[:, 0, 3].tolist() == [3.5 * STRIDE, 0.5 * STRIDE]


def test_pictures_of_another_size_are_refused():
    assert to_pictures([Image.new("RGB", (64, 64), (255, 0, 0))])[0, :, 5, 5].tolist() == [1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match=r"64 x 64 pixels, got \(128, 64\)"):
        to_pictures([Image.new("RGB", (128, 64))])
