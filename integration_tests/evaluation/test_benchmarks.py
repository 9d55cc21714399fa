# SPDX-License-Identifier: Apache-2.0
"""GenEval and T2I-CompBench: prompts, judges on tiny checkpoints against their formulas, scores of known pictures."""

import collections
import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import YolosConfig, YolosForObjectDetection

from diffusers_ternary import evaluate, quantize
from diffusers_ternary.demo import DEMO_CALL, demo_pipeline
from diffusers_ternary.evaluation import write_report
from diffusers_ternary.evaluation.benchmarks import GenEval, T2ICompBench, make_benchmark
from diffusers_ternary.evaluation.blip_vqa import BlipVqa
from diffusers_ternary.evaluation.clip_colors import ClipColors
from diffusers_ternary.evaluation.detectors import Found, load_detector
from diffusers_ternary.evaluation.geneval import TASKS, Detection, Requirement, Task
from diffusers_ternary.evaluation.geneval_prompts import CLASSES, COLORS, geneval_tasks
from diffusers_ternary.evaluation.judgement import judge_all
from diffusers_ternary.evaluation.report_page import render
from diffusers_ternary.evaluation.result import BenchmarkPair
from diffusers_ternary.evaluation.scenes.detector import Detector as SceneDetector
from diffusers_ternary.evaluation.t2i_compbench import (
    BindingTask,
    SpatialTask,
    parse_tasks,
    spatial_score,
    t2i_compbench_tasks,
)
from integration_tests.support import vision
from integration_tests.support.command_line import run_command


NAMES = ("person", "dog", "computer mouse", "couch")  # as GenEval calls the classes of the tiny detectors


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


class ScriptedDetector:
    """Finds what it is told."""

    def __init__(self, *detections: Detection) -> None:
        self.detections = detections

    def check_names(self, names) -> None:
        pass

    def __call__(self, image, names, threshold):
        found = [Found(item) for item in self.detections if item.name in names and item.score >= threshold]
        return sorted(found, key=lambda item: -item.detection.score)


def test_geneval_prompts_are_the_published_ones() -> None:
    tasks = geneval_tasks()
    counts = collections.Counter(task.tag for task in tasks)
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    # Of the published list, a line each.
    digest = hashlib.sha256("\n".join(task.prompt for task in tasks).encode()).hexdigest()
    assert digest == "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"
    by_prompt = {task.prompt: task for task in tasks}
    assert by_prompt["a photo of a bird left of a couch"].include == (
        Requirement("couch"),
        Requirement("bird", position=("left of", 0)),
    )
    assert by_prompt["a photo of three buses"].exclude == (Requirement("bus", 4),)
    assert by_prompt["a photo of a white dog and a blue potted plant"].include == (
        Requirement("dog", color="white"),
        Requirement("potted plant", color="blue"),
    )


def test_mask2former_boxes_are_around_its_masks(folder, image) -> None:
    detector = load_detector(vision.mask2former(folder / "mask2former"))
    found = detector(image, NAMES, 0.0)
    assert found
    assert [item.detection.score for item in found] == sorted((item.detection.score for item in found), reverse=True)
    for item in found:
        assert item.mask is not None
        assert item.mask.shape == (48, 64)
        rows, columns = np.nonzero(item.mask.numpy())
        assert item.detection.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert {item.detection.name for item in found} <= set(NAMES)
    one = found[0].detection.name
    assert {item.detection.name for item in detector(image, (one,), 0.0)} == {one}
    assert not detector(image, NAMES, 1.0)


def test_closed_vocabulary_detector_against_its_logits(folder, image) -> None:
    detector = load_detector(vision.yolos(folder / "yolos"))
    found = detector(image, NAMES, 0.0)
    with torch.no_grad():
        output = detector.model(**detector.processor(images=[image], return_tensors="pt"))
    scores, labels = output.logits[0].softmax(-1)[:, :-1].max(-1)
    x, y, w, h = output.pred_boxes[0].unbind(-1)
    boxes = torch.stack([(x - w / 2) * 64, (y - h / 2) * 48, (x + w / 2) * 64, (y + h / 2) * 48], dim=-1)
    order = scores.argsort(descending=True)
    kept = [i for i in order.tolist() if scores[i] > 0]
    assert len(found) == len(kept) > 0
    for item, index in zip(found, kept, strict=True):
        assert item.detection.name == NAMES[labels[index]]
        assert item.detection.score == pytest.approx(float(scores[index]), rel=1e-5)
        assert item.detection.box == pytest.approx(boxes[index].tolist(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", ["owlv2", "grounding_dino"])
def test_open_vocabulary_detectors_take_any_name(folder, image, kind) -> None:
    detector = load_detector(getattr(vision, kind)(folder / kind))
    detector.check_names(["a class nobody has heard of"])
    found = detector(image, ("dog", "cat"), 0.0)
    counts = collections.Counter(item.detection.name for item in found)
    assert counts["dog"] == counts["cat"] > 0
    with torch.no_grad():
        inputs = detector.processor(images=image, text=[["a dog"]], return_tensors="pt")
        best = detector.model(**inputs).logits.sigmoid().max()
    dogs = [item.detection.score for item in found if item.detection.name == "dog"]
    assert max(dogs) == pytest.approx(float(best), rel=1e-5)
    assert not detector(image, ("dog",), 1.1)


def test_color_is_the_nearest_of_the_averaged_templates(folder, image) -> None:
    colors = ClipColors(vision.clip(folder / "clip"), ("red", "blue", "green"))
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[10:20, 5:30] = True
    found = [Found(Detection("dog", 0.9, (5, 10, 30, 20)), mask), Found(Detection("cat", 0.8, (20.4, 3.0, 70, 60)))]
    crops = [image.copy().crop((5, 10, 30, 20)), image.crop((20, 3, 64, 48))]
    with torch.no_grad():
        pixels = colors.processor(images=crops, return_tensors="pt")["pixel_values"]
        for name, crop, answer in zip(("dog", "cat"), pixels, colors(image, found), strict=True):
            scores = []
            for color in colors.colors:
                texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
                tokens = colors.tokenizer([*texts, f"a photo of a {color} object"], padding=True, return_tensors="pt")
                output = colors.model(pixel_values=crop[None], **tokens)
                scores.append(
                    float((output.text_embeds.mean(0) / output.text_embeds.mean(0).norm()) @ output.image_embeds[0])
                )
            assert answer == colors.colors[int(np.argmax(scores))]


def test_masked_crop_is_gray_outside_the_mask() -> None:
    from diffusers_ternary.evaluation.clip_colors import _crop

    white = Image.new("RGB", (8, 8), (255, 255, 255))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2:4] = True
    crop = np.asarray(_crop(white, Found(Detection("dog", 1.0, (2, 2, 6, 4)), mask)))
    assert crop.shape == (2, 4, 3)
    assert (crop[:, :2] == 255).all()
    assert (crop[:, 2:] == 153).all()


def test_blip_vqa_is_the_first_step_of_generation(folder, image) -> None:
    vqa = BlipVqa(vision.blip_vqa(folder / "blip"))
    answers = vqa.yes(image, ("a red dog", "a cat"))
    pixels = vqa.processor(images=[image], return_tensors="pt")["pixel_values"]
    for phrase, answer in zip(("a red dog", "a cat"), answers, strict=True):
        question = vqa.tokenizer(f"{phrase}?", return_tensors="pt")
        output = vqa.model.generate(
            pixel_values=pixels,
            input_ids=question["input_ids"],
            attention_mask=question["attention_mask"],
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        yes, no = (
            float(output.logits[0][0, index].exp()) for index in (6 + 4, 6 + 5)
        )  # their lines in the vocabulary
        assert answer == pytest.approx(yes / (yes + no), rel=1e-4)


def test_geneval_scores_pictures_by_task(folder) -> None:
    detector = ScriptedDetector(
        Detection("dog", 0.95, (0, 0, 10, 10)),
        Detection("dog", 0.92, (0, 40, 10, 50)),
        Detection("cat", 0.5, (40, 0, 50, 10)),
    )
    tasks = [
        Task("single_object", "a photo of a dog", (Requirement("dog"),)),
        Task("two_object", "a photo of a dog and a bus", (Requirement("dog"), Requirement("bus"))),
        Task("counting", "a photo of two dogs", (Requirement("dog", 2),), (Requirement("dog", 3),)),
        Task("counting", "a photo of one cat", (Requirement("cat"),)),  # 0.5 is not sure enough for counting
        Task(
            "position",
            "a photo of a cat right of a dog",
            (Requirement("dog"), Requirement("cat", position=("right of", 0))),
        ),
    ]
    benchmark = GenEval(detector=detector, tasks=tasks, images_per_prompt=2)
    assert benchmark.colors is None
    scores = judge_all(benchmark, [Image.new("RGB", (64, 64))] * 10)
    assert scores.per_task == {"single_object": 1.0, "two_object": 0.0, "counting": 0.5, "position": 1.0}
    assert scores.overall == 0.625
    assert scores.judgements[2].reason == "expected 1 bus, found 0"
    with pytest.raises(ValueError, match="9 pictures for 5 prompts of GenEval; it takes 2 each"):
        judge_all(benchmark, [Image.new("RGB", (64, 64))] * 9)


def test_geneval_through_real_checkpoints(folder, image) -> None:
    tasks = [
        Task("colors", "a photo of a red dog", (Requirement("dog", color="red"),)),
        Task("counting", "a photo of two couches", (Requirement("couch", 2),), (Requirement("couch", 3),)),
    ]
    checkpoint = vision.mask2former(folder / "mask2former2")
    benchmark = GenEval(detector=checkpoint, clip=vision.clip(folder / "clip2"), tasks=tasks, images_per_prompt=1)
    assert benchmark.colors is not None
    assert benchmark.colors.colors == COLORS
    scores = judge_all(benchmark, [image, image])
    assert scores.per_task == {"colors": 0.0, "counting": 0.0}  # random weights are never sure
    assert [judgement.reason for judgement in scores.judgements] == [
        "expected 1 dog, found 0",
        "expected 2 couch, found 0",
    ]
    unknown = [Task("single_object", "a photo of a unicorn", (Requirement("unicorn"),))]
    with pytest.raises(ValueError, match=r"knows 4 classes .* but not unicorn"):
        GenEval(detector=checkpoint, tasks=unknown)


def test_compbench_prompts_and_their_phrases() -> None:
    tasks = t2i_compbench_tasks()
    assert collections.Counter(task.tag for task in tasks) == {
        "color": 100,
        "shape": 100,
        "texture": 100,
        "spatial": 100,
    }
    assert tasks == t2i_compbench_tasks()
    for tag in ("color", "shape", "texture", "spatial"):
        own = [task for task in tasks if task.tag == tag]
        parsed, others = parse_tasks([task.prompt for task in own], tag)
        assert not others
        assert parsed == own


@pytest.mark.parametrize(
    ("prompt", "tag", "expected"),
    [
        ("a red book and a yellow vase", "color", ("a red book", "a yellow vase")),
        ("fluffy clouds and a glass table", "texture", ("fluffy clouds", "a glass table")),
        ("A bathroom with white tile and a beige toilet.", "color", None),
        ("a red car, a blue car and a bus", "color", None),
        ("a cat on top of a dog", "spatial", ("cat", "dog", "on the top of")),
        ("a girl on side of a bird", "spatial", ("person", "bird", "on side of")),
        ("a cat dreams of a dog", "spatial", None),
    ],
)
def test_compbench_reads_prompts_of_its_templates(prompt, tag, expected) -> None:
    tasks, others = parse_tasks([prompt], tag)
    if expected is None:
        assert (tasks, others) == ([], [prompt])
    elif tag == "spatial":
        assert tasks == [SpatialTask(prompt, *expected)]
    else:
        assert tasks == [BindingTask(tag, prompt, expected)]


@pytest.mark.parametrize(
    ("relation", "box", "expected"),
    [
        ("on the left of", (0, 40, 10, 50), 1.0),  # other: (40, 40, 60, 60)
        ("on the right of", (0, 40, 10, 50), 0.0),
        ("on the left of", (35, 40, 55, 60), 0.1 / 0.6),  # overlap 15 * 20 of 500
        ("on the top of", (40, 0, 60, 10), 1.0),
        ("on the top of", (0, 0, 20, 20), 0.0),  # as far left as up
        ("on the bottom of", (40, 0, 60, 10), 0.0),
        ("next to", (0, 40, 10, 50), 1.0),  # level with it: the rows are near
        ("near", (0, 0, 10, 10), (150 / 512 * 100) / 45),  # 45 pixels off on both axes; near is 29.3
    ],
)
def test_spatial_score_is_half_the_relation(relation, box, expected) -> None:
    task = SpatialTask("", "cat", "dog", relation)
    detections = [
        Detection("cat", 0.8, box),
        Detection("dog", 0.6, (40, 40, 60, 60)),
        Detection("dog", 0.1, (0, 0, 1, 1)),
    ]
    total, reason = spatial_score(task, detections, (100, 100))
    wanted = 0.25 * (0.8 + 0.6) + 0.5 * expected
    assert total == pytest.approx(wanted if wanted >= 0.5 else 0.0)
    assert (reason is None) == (expected == 1)
    assert spatial_score(task, detections[:1], (100, 100)) == (0.0, "no dog found")


def test_compbench_multiplies_the_answers(folder, image) -> None:
    tasks = [
        BindingTask("color", "a red dog and a cat", ("a red dog", "a cat")),
        SpatialTask("a dog on the left of a cat", "dog", "cat", "on the left of"),
    ]
    detector = ScriptedDetector(Detection("dog", 0.9, (0, 0, 5, 5)), Detection("cat", 0.7, (30, 0, 40, 9)))
    benchmark = T2ICompBench(
        vqa=vision.blip_vqa(folder / "blip2"), detector=detector, tasks=tasks, images_per_prompt=1
    )
    scores = judge_all(benchmark, [image, image])
    assert benchmark.vqa is not None
    assert scores.judgements[0].score == pytest.approx(np.prod(benchmark.vqa.yes(image, tasks[0].phrases)), rel=1e-6)
    assert scores.judgements[1].score == pytest.approx(0.25 * 1.6 + 0.5)
    assert scores.per_task.keys() == {"color", "spatial"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: make_benchmark("genevil"), "benchmark='genevil' is not one of scenes, geneval, t2i-compbench"),
        (lambda folder: GenEval(detector=folder / "nothing"), "The detector '.*nothing' cannot be loaded"),
        (lambda folder: GenEval(detector=vision.clip(folder / "c")), "holds a clip model, which detects no objects"),
        (
            lambda folder: GenEval(detector=ScriptedDetector(), clip=folder / "nothing"),
            "The color classifier '.*nothing' cannot be loaded",
        ),
        (lambda folder: make_benchmark("geneval", vqa="x"), "geneval has no vqa. Its options are detector, clip,"),
        (lambda folder: make_benchmark("scenes", clip="x"), "scenes has no clip. Its options are judge, prompts,"),
        (lambda folder: make_benchmark("scenes", judge=folder / "none"), "The judge '.*none' cannot be loaded"),
    ],
)
def test_missing_and_wrong_checkpoints_are_named(tmp_path, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_evaluate_draws_judges_and_reports_a_benchmark(folder, tmp_path) -> None:
    teacher, student = demo_pipeline(), quantize(demo_pipeline())
    prompts = ("a smiling person with red hair", "a person with a hat")
    tasks = [Task("counting", prompts[0], (Requirement("dog", 1),)), Task("colors", prompts[1], (Requirement("cat"),))]
    calls: list[int] = []

    class Third(ScriptedDetector):
        """Sees a dog everywhere, and a cat in the third and fourth picture that it is shown of it: the student's."""

        def __call__(self, image, names, threshold):
            calls.append(len(names))
            self.detections = (
                Detection("dog", 0.95, (0, 0, 9, 9)),
                Detection("cat", 0.9 if len(calls) > 4 else 0.2, (0, 0, 9, 9)),
            )
            return super().__call__(image, names, threshold)

    benchmark = GenEval(detector=Third(), tasks=tasks, images_per_prompt=2)
    result = evaluate(
        student, teacher, benchmark=benchmark, call_kwargs=DEMO_CALL, batch_size=4, velocity_prompts=0, progress=False
    )
    assert len(calls) == 8
    assert result.prompts == (prompts[0], prompts[0], prompts[1], prompts[1])
    assert result.seeds == (0, 1, 2, 3)
    pair = result.benchmark
    assert pair is not None
    assert pair.teacher.per_task == {"counting": 1.0, "colors": 0.0}
    assert pair.student.overall == 1.0
    assert pair.relative == 2.0
    assert pair.misses == ()
    swapped = dataclasses.replace(result, benchmark=BenchmarkPair("GenEval", pair.teacher, pair.student))
    assert swapped.benchmark is not None
    assert swapped.benchmark.misses == (2, 3)
    assert "50.0 % of the teacher's; mean of tasks" in str(swapped)
    stored = json.loads(json.dumps(swapped.to_dict()))["benchmark"]
    assert stored["per_task"]["student"] == {"counting": 1.0, "colors": 0.0}
    assert stored["images"][3] == {
        "task": "colors",
        "student": {"score": 0.0, "reason": "expected 1 cat, found 0"},
        "teacher": {"score": 1.0, "reason": None},
    }
    page = write_report(swapped, tmp_path, student_name="s", teacher_name="t").read_text()
    assert "Where GenEval finds the student wrong" in page
    assert page.count("expected 1 cat, found 0") == 4  # two misses, shown there and among all images
    assert "Where GenEval" not in render(result, student_name="s", teacher_name="t")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "geneval", "prompts": ["a cat"]}, "Give prompts or benchmark, not both"),
        ({"prompts": ["a cat"], "benchmark_options": {"clip": "x"}}, "without a benchmark"),
        ({"benchmark": "coco"}, "benchmark='coco' is not one of"),
        (
            {"benchmark": "geneval", "benchmark_options": {"detector": "nothing-here"}},
            "detector 'nothing-here' cannot be loaded",
        ),
    ],
)
def test_benchmark_arguments_are_checked_before_anything_is_drawn(options, message) -> None:
    pipeline = demo_pipeline()
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, pipeline, **options)


def test_scenes_judges_its_grammar_and_warns_of_other_prompts(tmp_path, caplog, monkeypatch) -> None:
    torch.manual_seed(0)
    detector = SceneDetector(width=16)
    save_file(detector.state_dict(), tmp_path / "judge.safetensors")
    prompts = ["a photo of a cat", "a photo of two keys", "a photograph of my aunt"]
    benchmark = make_benchmark("scenes", judge=tmp_path / "judge.safetensors", prompts=prompts)
    assert benchmark.tags == ("single_object", "counting", "unknown")
    assert "1 of the prompts cannot be judged" in caplog.text
    scores = judge_all(benchmark, [Image.new("RGB", (64, 64))] * 3)
    assert scores.per_task == {"single_object": 0.0, "counting": 0.0, "unknown": 0.0}
    assert scores.judgements[2].reason == "the prompt is outside the grammar"
    assert len(make_benchmark("scenes").prompts) == 553  # with the judge of the repository
    monkeypatch.setenv("DIFFUSERS_TERNARY_SCENES", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="clone the diffusers-ternary repository"):
        make_benchmark("scenes")
    with pytest.raises(ValueError, match="64 x 64"):
        benchmark.judge(0, Image.new("RGB", (32, 32)))


def test_command_line_draws_a_benchmark(tmp_path) -> None:
    checkpoint = vision.yolos(tmp_path / "yolos")
    classes = dict(enumerate(CLASSES))
    config = YolosConfig.from_pretrained(checkpoint)
    config.id2label, config.label2id = classes, {name: index for index, name in classes.items()}
    YolosForObjectDetection(config).save_pretrained(checkpoint)
    models = ["--detector", str(checkpoint), "--color-model", str(vision.clip(tmp_path / "clip"))]
    options = [
        *("--benchmark", "geneval", "--limit", "1", "--images-per-prompt", "1", "--steps", "1"),
        "--batch-size",
        "6",
    ]
    options += ["--velocity-prompts", "0"]
    done = run_command("evaluate", "demo:rounded", "demo", *options, *models, "--report", tmp_path / "report")
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "report" / "result.json").read_text())["benchmark"]
    assert stored["name"] == "GenEval"
    assert list(stored["per_task"]["student"]) == [*TASKS]
    assert len(stored["images"]) == 6


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ([], "Give --prompts FILE or --benchmark NAME", 2),
        (["--benchmark", "geneval", "--prompts", "-"], "Give --prompts FILE or --benchmark NAME", 2),
        (["--benchmark", "scenes", "--vqa", "x"], "scenes has no vqa", 3),
        (["--benchmark", "coco"], "is not one of scenes, geneval", 3),
        (["--prompts", "-", "--vqa", "x"], "need --benchmark", 2),
    ],
)
def test_command_line_says_what_a_benchmark_needs(options, message, code) -> None:
    done = run_command("evaluate", "demo:rounded", "demo", *options, stdin="a cat\n")
    assert done.exit_code == code
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("call", "drawn"),
    [({}, "SIDE x SIDE"), ({"height": 32, "width": 64}, "64 x 32"), ({"height": 64}, "SIDE x 64")],
    ids=["default", "another size", "one side"],
)
def test_pictures_that_the_judge_of_scenes_cannot_read_are_not_drawn(call, drawn, tmp_path, monkeypatch) -> None:
    save_file(SceneDetector(width=16).state_dict(), tmp_path / "judge.safetensors")
    pipeline = demo_pipeline()
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *args, **kwargs: pytest.fail("the denoiser ran"))
    drawn = drawn.replace("SIDE", str(side))
    message = rf"reads pictures of 64 x 64 pixels, but FluxPipeline draws {drawn}\. .*--height"
    benchmark = make_benchmark("scenes", judge=tmp_path / "judge.safetensors", prompts=["a photo of a cat"])
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, pipeline, benchmark=benchmark, call_kwargs=call, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: GenEval(detector=ScriptedDetector(), clip=vision.blip_vqa(folder / "b")),
            "The color classifier '.*b' cannot be loaded",
        ),
        (
            lambda folder: make_benchmark("t2i-compbench", detector=ScriptedDetector(), vqa=vision.clip(folder / "c")),
            r"The question answering model '.*c' cannot be loaded",
        ),
        (lambda folder: load_detector(damaged(vision.yolos(folder / "y"))), "y' cannot be loaded: it lacks 6 of the "),
    ],
    ids=["clip", "vqa", "detector"],
)
def test_checkpoints_of_another_task_are_refused(make, message, tmp_path) -> None:
    """transformers fills what is missing with random weights, so that every picture would be judged at random."""
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def damaged(folder):
    """The checkpoint without its classifier."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "class_labels_classifier" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
