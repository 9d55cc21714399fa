# SPDX-License-Identifier: Apache-2.0
"""What the scenes show is what their labels say: boxes, colors, numbers, relations; nothing touches."""

import random

import pytest
import torch

from diffusers_ternary.evaluation.geneval import TASKS, Detection, score
from diffusers_ternary.evaluation.scenes.prompts import COMPOSED, benchmark_tasks, held_out_combination, training_task
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES, COLORS
from integration_tests.support.scenes import examples


renderer = examples("renderer")
NAMES = tuple(COLORS)


@pytest.fixture(scope="module")
def sprites():
    return renderer.Sprites()


@pytest.fixture(scope="module")
def scenes(sprites):
    rng = random.Random(11)
    tasks = [training_task((*TASKS, COMPOSED)[k % 7], rng) for k in range(210)]
    return tasks, renderer.layout_of(tasks, sprites, rng, training=True)


def objects_of(layout, scene):
    """Rows of the objects that are there."""
    rows = layout.objects[scene]
    return rows[rows[:, 0] != renderer.NOTHING].tolist()


def test_boxes_are_exactly_where_something_is_drawn(scenes, sprites):
    _, layout = scenes
    cover = renderer.Renderer(sprites).coverage(layout)
    boxes = renderer.boxes_of(layout, sprites)
    for scene in range(len(boxes)):
        for slot in range(boxes.shape[1]):
            rows, columns = (cover[scene, slot] > 0).nonzero(as_tuple=True)
            box = boxes[scene, slot].tolist()
            if layout.objects[scene, slot, 0] == renderer.NOTHING:
                assert not len(rows)
                assert box == [0, 0, 0, 0]
                continue
            drawn = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
            assert drawn == box
            assert min(box) >= 0
            assert max(box) <= renderer.CANVAS
            assert max(box[2] - box[0], box[3] - box[1]) in (16, 18, 20)


def test_objects_do_not_touch(scenes, sprites):
    _, layout = scenes
    covered = (renderer.Renderer(sprites).coverage(layout) > 0).float()
    grown = torch.nn.functional.max_pool2d(covered, 3, stride=1, padding=1)  # 8-neighborhood
    overlap = torch.einsum("bihw,bjhw->bij", grown, covered)
    overlap.diagonal(dim1=1, dim2=2).zero_()
    assert overlap.max() == 0


def test_colors_are_exact_where_an_object_covers_all(scenes, sprites):
    _, layout = scenes
    drawer = renderer.Renderer(sprites)
    cover, pictures = drawer.coverage(layout), drawer.draw(layout)
    values = ((pictures + 1) * 127.5).round().int()
    for scene in range(len(values)):
        for slot, (_, color, *_) in enumerate(objects_of(layout, scene)):
            inside = values[scene][:, cover[scene, slot] == 1.0].T  # [pixels, 3]
            assert len(inside) > 20
            assert (inside == torch.tensor(COLORS[NAMES[color]])).all()
    empty = cover.sum(1) == 0
    expected = drawer.backgrounds[layout.background][..., None].expand(-1, -1, -1, renderer.CANVAS)
    assert torch.equal(pictures.permute(0, 2, 3, 1)[empty], expected.permute(0, 2, 3, 1)[empty])


def detections_of(layout, sprites, scene):
    boxes = renderer.boxes_of(layout, sprites)[scene].tolist()
    return [
        Detection(CLASSES[kind], 1.0, tuple(box), NAMES[color])
        for (kind, color, *_), box in zip(objects_of(layout, scene), boxes, strict=False)
    ]


def test_every_scene_shows_what_its_prompt_says(scenes, sprites):
    tasks, layout = scenes
    for scene, task in enumerate(tasks):
        assert score(task, detections_of(layout, sprites, scene)), task.prompt
        assert len(objects_of(layout, scene)) == sum(requirement.count for requirement in task.include)


def test_held_out_colors_are_not_even_drawn_by_chance(scenes):
    _, layout = scenes
    drawn = {(kind, color) for scene in range(210) for kind, color, *_ in objects_of(layout, scene)}
    assert not [1 for kind, color in drawn if held_out_combination(f"{NAMES[color]} {CLASSES[kind]}")]


def test_held_out_scenes_can_be_drawn_and_are_right(sprites):
    tasks = benchmark_tasks(60, 1)
    layout = renderer.layout_of(tasks, sprites, random.Random(1), training=False)
    assert all(score(task, detections_of(layout, sprites, scene)) for scene, task in enumerate(tasks))


def test_drawing_does_not_depend_on_the_batch(scenes, sprites):
    _, layout = scenes
    drawer = renderer.Renderer(sprites)
    alone = renderer.Layout(layout.objects[7:8], layout.background[7:8])
    assert torch.equal(drawer.draw(alone)[0], drawer.draw(layout)[7])


def test_every_class_has_a_shape_of_its_own(sprites):
    masks = sprites.masks[:, -1].flatten(1).float() / 255  # [classes, 400]
    together = masks @ masks.T
    either = masks.sum(1)[:, None] + masks.sum(1) - together
    likeness = (together / either).fill_diagonal_(0)
    assert likeness.max() < 0.9


def test_content_is_what_the_boxes_cover():
    """The share of each class in each patch, against the pictures of one object at a time."""
    sprites, rng = renderer.Sprites(), random.Random(5)
    tasks = [training_task("color_attr", rng) for _ in range(4)]
    layout = renderer.layout_of(tasks, sprites, rng, training=True)
    classes, colors = renderer.Renderer(sprites).content(layout, 8)
    torch.testing.assert_close(classes.sum(-1), torch.ones(4, 64))
    torch.testing.assert_close(colors.sum(-1), torch.ones(4, 64))
    for picture, objects in enumerate(layout.objects):
        for kind, color, size, left, top in (row.tolist() for row in objects if row[0] >= 0):
            whole = torch.zeros(64, 64)
            width, height = sprites.extents[kind, size]
            mask = sprites.masks[kind, size, :height, :width] / 255.0
            whole[top : top + height, left : left + width] = mask
            share = torch.nn.functional.avg_pool2d(whole[None], 8).flatten()
            torch.testing.assert_close(classes[picture, :, kind], share)
            assert (colors[picture, :, color] >= share - 1e-6).all()


def test_close_ups_show_one_whole_object():
    sprites, rng = renderer.Sprites(), random.Random(6)
    tasks = [training_task("colors", rng) for _ in range(64)]
    layout = renderer.close_up_of(tasks, sprites, rng)
    boxes = renderer.boxes_of(layout, sprites)[:, 0]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= renderer.CLOSE_UP).all()
    pictures = renderer.Renderer(sprites).draw(layout)
    assert pictures.shape == (64, 3, renderer.CLOSE_UP, renderer.CLOSE_UP)
