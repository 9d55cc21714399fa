# SPDX-License-Identifier: Apache-2.0
"""GenEval's rules on detections made by hand."""

import pytest

from diffusers_ternary.evaluation.geneval import (
    TASKS,
    Detection,
    Requirement,
    Task,
    aggregate,
    relative_position,
    score,
)


def found(name, score=0.95, box=(0, 0, 10, 10), color=None):
    return Detection(name, score, box, color)


def counting(count):
    return Task("counting", "", (Requirement("key", count),), (Requirement("key", count + 1),))


@pytest.mark.parametrize(
    ("number", "correct", "reason"),
    [(2, False, "expected 3 key, found 2"), (3, True, ""), (4, False, "expected fewer than 4 key, found 4")],
)
def test_counting_wants_exactly_that_many(number, correct, reason):
    verdict = score(counting(3), [found("key", box=(20 * k, 0, 20 * k + 10, 10)) for k in range(number)])
    assert bool(verdict) == correct
    assert verdict.reasons == ((reason,) if reason else ())


def test_counting_looks_at_sure_detections_only():
    sure, unsure = found("key", 0.901), found("key", 0.9)
    assert score(counting(2), [sure, sure, unsure])  # a score has to be above 0.9 in counting
    assert not score(counting(2), [sure, unsure])
    two = Task("two_object", "", (Requirement("key", 2),))
    assert score(two, [sure, found("key", 0.301)])  # above 0.3 everywhere else
    assert not score(two, [sure, found("key", 0.3)])


def test_two_objects_and_reasons():
    task = Task("two_object", "a photo of a cat and a rocket", (Requirement("cat"), Requirement("rocket")))
    assert score(task, [found("cat"), found("rocket"), found("bus")])  # more than was asked for is not wrong here
    verdict = score(task, [found("cat"), found("bus")])
    assert not verdict.correct
    assert verdict.reasons == ("expected 1 rocket, found 0",)
    assert len(score(task, []).reasons) == 2


def test_color_is_that_of_the_surest_detection():
    task = Task("colors", "", (Requirement("bell", color="red"),))
    assert score(task, [found("bell", 0.9, color="red"), found("bell", 0.5, color="blue")])
    verdict = score(task, [found("bell", 0.5, color="red"), found("bell", 0.9, color="blue")])
    assert verdict.reasons == ("expected 1 red bell, found blue",)
    assert not score(task, [found("bell")])


def test_color_attribution_wants_each_with_its_own_color():
    task = Task("color_attr", "", (Requirement("bell", color="red"), Requirement("bus", color="blue")))
    assert score(task, [found("bell", color="red"), found("bus", color="blue")])
    swapped = score(task, [found("bell", color="blue"), found("bus", color="red")])
    assert swapped.reasons == ("expected 1 red bell, found blue", "expected 1 blue bus, found red")


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((20, 0, 30, 10), {"right of"}),
        ((-20, 0, -10, 10), {"left of"}),
        ((0, -20, 10, -10), {"above"}),
        ((0, 20, 10, 30), {"below"}),
        ((20, 20, 30, 30), {"right of", "below"}),  # 0.9 / sqrt(2) = 0.636 on both axes
        ((0, 0, 10, 10), set()),
        ((2, 0, 12, 10), set()),  # 2 pixels are the margin: 0.1 of 10 + 10
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 = 0.5 is not more than half
        ((4.1, 0, 14.1, 10), {"right of"}),  # 2.1 / 4.1 = 0.512
        ((20, 11, 30, 21), {"right of"}),  # below by (11 - 2) / 22.8 = 0.394 only
        ((20, 14, 30, 24), {"right of"}),  # (14 - 2) / 24.4 = 0.492
        ((20, 15, 30, 25), {"right of", "below"}),  # (15 - 2) / 25 = 0.52
    ],
)
def test_relative_position_with_its_margin(box, relations):
    assert relative_position(box, (0, 0, 10, 10)) == relations


def test_the_margin_grows_with_the_boxes():
    assert relative_position((6, 0, 16, 10), (0, 0, 10, 10)) == {"right of"}  # (6 - 2) / 6
    assert relative_position((6, 0, 46, 10), (0, 0, 40, 10)) == frozenset()  # 8 pixels of margin


def position(relation, count=1):
    include = (Requirement("clock", count), Requirement("dog", position=(relation, 0)))
    return Task("position", f"a photo of a dog {relation} a clock", include)


def test_position_is_that_of_the_later_class_seen_from_the_earlier():
    detections = [found("clock", box=(0, 0, 10, 10)), found("dog", box=(30, 0, 40, 10))]
    assert score(position("right of"), detections)
    verdict = score(position("left of"), detections)
    assert verdict.reasons == ("expected dog left of clock, found it right of it",)
    close = score(position("right of"), [found("clock"), found("dog", box=(1, 0, 11, 10))])
    assert close.reasons == ("expected dog right of clock, found it too close to it",)


def test_position_needs_every_pair_and_its_target():
    clocks = [found("clock", box=(0, 0, 10, 10)), found("clock", box=(60, 0, 70, 10))]
    assert not score(position("right of", count=2), [*clocks, found("dog", box=(30, 0, 40, 10))])
    assert score(position("right of", count=2), [*clocks, found("dog", box=(90, 0, 100, 10))])
    verdict = score(position("right of"), [found("dog")])
    assert verdict.reasons == ("expected 1 clock, found 0", "no clock for dog to be right of")


def test_tasks_weigh_the_same_whatever_their_number_of_pictures():
    right, wrong = score(Task("colors", "", ()), []), score(counting(1), [])
    one, other = Task("colors", "", ()), counting(1)
    scores = aggregate([(one, right)] * 9 + [(other, wrong)] + [(Task("single_object", "", ()), right)])
    assert list(scores.per_task) == ["single_object", "counting", "colors"]
    assert scores.per_task["counting"] == 0.0
    assert scores.overall == pytest.approx(2 / 3)
    assert scores.counts == {"single_object": 1, "counting": 1, "colors": 9}
    assert set(scores.per_task) < set(TASKS)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"Unknown relation 'behind'; choose from left of, right of, above, below"):
        Requirement("dog", position=("behind", 0))
    with pytest.raises(ValueError, match="counts from 1, got count=0 for 'dog'"):
        Requirement("dog", count=0)
    with pytest.raises(ValueError, match="refers to requirement 1; a position can only refer to an earlier one"):
        Task("position", "x", (Requirement("cat"), Requirement("dog", position=("above", 1))))
    with pytest.raises(ValueError, match="nothing to aggregate"):
        aggregate([])


def test_a_line_of_genevals_metadata():
    line = {
        "tag": "position",
        "include": [
            {"class": "bench", "count": 1},
            {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "exclude": [{"class": "cat", "count": 2}],
        "prompt": "a photo of a dog left of a bench",
    }
    assert Task.from_metadata(line) == Task(
        "position",
        "a photo of a dog left of a bench",
        (Requirement("bench"), Requirement("dog", 1, "red", ("left of", 0))),
        (Requirement("cat", 2),),
    )
    for broken, missing in (({"tag": "colors"}, "prompt"), ({**line, "include": [{"count": 1}]}, "class")):
        with pytest.raises(ValueError, match=rf"not a line of GenEval's metadata \(KeyError\('{missing}'\)\)"):
            Task.from_metadata(broken)
    with pytest.raises(ValueError, match="not a line of GenEval's metadata"):
        Task.from_metadata({**line, "include": ["bench"]})
