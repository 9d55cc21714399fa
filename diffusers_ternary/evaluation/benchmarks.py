# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of prompt following: which prompts each draws, how often, and what judges its pictures."""

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from . import geneval, t2i_compbench
from .blip_vqa import BlipVqa
from .clip_colors import ClipColors
from .detectors import Detector, load_detector
from .geneval_prompts import COLORS, geneval_tasks
from .judgement import Benchmark, Judgement
from .scenes.detector import CANVAS, to_pictures
from .scenes.detector import Detector as SceneDetector
from .scenes.files import JUDGE, scenes_file
from .scenes.prompts import benchmark_tasks, read_task


# What the benchmarks' authors use, as their Hub ids in transformers' format.
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
VQA = "Salesforce/blip-vqa-base"
IMAGES_PER_PROMPT = 4
UNKNOWN = "unknown"  # task of a prompt that nothing can judge

logger = logging.getLogger(__name__)


def first_of_each_task(tasks: Sequence[Any], limit: int | None) -> tuple[Any, ...]:
    """The first `limit` of each task; all without a limit."""
    if limit is None:
        return tuple(tasks)
    taken: dict[str, int] = {}
    chosen = []
    for task in tasks:
        taken[task.tag] = taken.get(task.tag, 0) + 1
        if taken[task.tag] <= limit:
            chosen.append(task)
    return tuple(chosen)


class GenEval:
    """GenEval (Ghosh et al., arXiv:2310.11513): 553 prompts of six tasks, judged by a detector and CLIP.

    Args:
        detector (`str`, `os.PathLike` or [`Detector`], *optional*): folder or Hub id, see [`load_detector`].
        clip (`str` or `os.PathLike`, *optional*): folder or Hub id of the CLIP model that names colors.
        tasks (`Sequence[geneval.Task]`, *optional*): other prompts, judged by the same rules.
        images_per_prompt (`int`, *optional*, defaults to 4): as in the paper.
        prompts_per_task (`int`, *optional*): only the first of each task.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where detector and CLIP run.

    Raises:
        ValueError: if a checkpoint cannot be loaded, is of another task, or does not know a class of the prompts.
    """

    name = "GenEval"

    def __init__(
        self,
        *,
        detector: "str | os.PathLike[str] | Detector" = DETECTOR,
        clip: str | os.PathLike[str] = CLIP,
        tasks: Sequence[geneval.Task] | None = None,
        images_per_prompt: int = IMAGES_PER_PROMPT,
        prompts_per_task: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.tasks: tuple[geneval.Task, ...] = first_of_each_task(tasks or geneval_tasks(), prompts_per_task)
        self.prompts = tuple(task.prompt for task in self.tasks)
        self.tags = tuple(task.tag for task in self.tasks)
        self.images_per_prompt = images_per_prompt
        self.detector = _detector(detector, [need.name for task in self.tasks for need in task.include], device)
        colored = any(need.color for task in self.tasks for need in task.include)
        self.colors = ClipColors(clip, COLORS, device=device) if colored else None

    def judge(self, index: int, image: Image.Image) -> Judgement:
        """Judges a picture of `prompts[index]`: 1 if all that the prompt asks for is there, else 0."""
        task = self.tasks[index]
        names = {need.name: need for need in (*task.include, *task.exclude)}
        found = self.detector(image, tuple(names), task.threshold)
        colored = {need.name for need in task.include if need.color is not None}
        detections = [item.detection for item in found if item.detection.name not in colored]
        if self.colors is not None:
            asked = [item for item in found if item.detection.name in colored]
            colors = self.colors(image, asked)
            detections += [
                dataclasses.replace(item.detection, color=color) for item, color in zip(asked, colors, strict=True)
            ]
        return geneval.score(task, detections).judgement


class T2ICompBench:
    """T2I-CompBench (Huang et al., arXiv:2307.06350): attributes by BLIP-VQA, 2D relations by a detector.

    The score of an attribute prompt is the product over its noun phrases of the probability of "yes".

    Args:
        vqa (`str` or `os.PathLike`, *optional*): folder or Hub id of the question answering model.
        detector (`str`, `os.PathLike` or [`Detector`], *optional*): for the relations, see [`load_detector`]. The
            paper uses UniDet, which transformers does not have.
        tasks (*optional*): other prompts, e.g. from [`t2i_compbench.parse_tasks`].
        images_per_prompt (`int`, *optional*, defaults to 4): the paper draws 10.
        prompts_per_task (`int`, *optional*): only the first of each task.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where both run.

    Raises:
        ValueError: if a checkpoint cannot be loaded, is of another task, or does not know a class of the prompts.
    """

    name = "T2I-CompBench"

    def __init__(
        self,
        *,
        vqa: str | os.PathLike[str] = VQA,
        detector: "str | os.PathLike[str] | Detector" = DETECTOR,
        tasks: Sequence[t2i_compbench.BindingTask | t2i_compbench.SpatialTask] | None = None,
        images_per_prompt: int = IMAGES_PER_PROMPT,
        prompts_per_task: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.tasks = first_of_each_task(tasks or t2i_compbench.t2i_compbench_tasks(), prompts_per_task)
        self.prompts = tuple(task.prompt for task in self.tasks)
        self.tags = tuple(task.tag for task in self.tasks)
        self.images_per_prompt = images_per_prompt
        spatial = [task for task in self.tasks if isinstance(task, t2i_compbench.SpatialTask)]
        names = [name for task in spatial for name in (task.first, task.second)]
        self.detector = _detector(detector, names, device) if spatial else None
        self.vqa = BlipVqa(vqa, device=device) if len(spatial) < len(self.tasks) else None

    def judge(self, index: int, image: Image.Image) -> Judgement:
        """Judges a picture of `prompts[index]`."""
        task = self.tasks[index]
        if isinstance(task, t2i_compbench.SpatialTask):
            assert self.detector is not None
            found = self.detector(image, (task.first, task.second), geneval.SCORE_THRESHOLD)
            return Judgement(*t2i_compbench.spatial_score(task, [item.detection for item in found], image.size))
        assert self.vqa is not None
        answers = self.vqa.yes(image, task.phrases)
        score = 1.0
        for answer in answers:
            score *= answer
        doubted = [phrase for phrase, answer in zip(task.phrases, answers, strict=True) if answer < 0.5]
        return Judgement(score, f"not seen: {', '.join(doubted)}" if doubted else None)


class Scenes:
    """GenEval's rules over pictures of the Scenes models, whose objects a small detector finds.

    Args:
        judge (`str` or `os.PathLike`, *optional*): the detector's weights, as `examples/scenes/train_judge.py` writes
            them; default: those of the repository, see [`scenes_file`].
        prompts (`Sequence[str]`, *optional*): of the Scenes grammar; prompts outside of it are drawn, but their
            pictures cannot be judged and count as missed.
        count (`int`, *optional*, defaults to 553): held-out prompts to draw when no prompts are given.
        seed (`int`, *optional*, defaults to 0): of those prompts.
        images_per_prompt (`int`, *optional*, defaults to 1).
        prompts_per_task (`int`, *optional*): only the first of each task.

    Raises:
        ValueError: if there is no such file, or it holds something else.
        FileNotFoundError: without `judge`, if the repository's is not on this machine; says how to get it.
    """

    name = "Scenes"
    image_size = CANVAS, CANVAS

    def __init__(
        self,
        *,
        judge: str | os.PathLike[str] | None = None,
        prompts: Sequence[str] | None = None,
        count: int = 553,
        seed: int = 0,
        images_per_prompt: int = 1,
        prompts_per_task: int | None = None,
    ) -> None:
        judge = scenes_file(JUDGE) if judge is None else judge
        try:
            self.detector = SceneDetector.from_file(os.fspath(judge))
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The judge {os.fspath(judge)!r} cannot be loaded ({error}). Give the file that "
                "examples/scenes/train_judge.py writes."
            ) from error
        tasks = benchmark_tasks(count, seed) if prompts is None else [_scene_task(prompt) for prompt in prompts]
        unread = [task.prompt for task in tasks if task.tag == UNKNOWN]
        if unread:
            logger.warning(
                "%d of the prompts cannot be judged: they are outside the grammar of Scenes; the first is %r.",
                len(unread),
                unread[0],
            )
        self.tasks: tuple[geneval.Task, ...] = first_of_each_task(tasks, prompts_per_task)
        self.prompts = tuple(task.prompt for task in self.tasks)
        self.tags = tuple(task.tag for task in self.tasks)
        self.images_per_prompt = images_per_prompt

    def judge(self, index: int, image: Image.Image) -> Judgement:
        """Judges a picture of `prompts[index]`: 1 if all that the prompt asks for is there, else 0."""
        if self.tasks[index].tag == UNKNOWN:
            return Judgement(0.0, "the prompt is outside the grammar")
        return geneval.score(self.tasks[index], self.detector.detect(to_pictures([image]))[0]).judgement


def _scene_task(prompt: str) -> geneval.Task:
    return read_task(prompt) or geneval.Task(UNKNOWN, prompt, ())


BENCHMARKS: Mapping[str, Callable[..., Benchmark]] = {
    "scenes": Scenes,
    "geneval": GenEval,
    "t2i-compbench": T2ICompBench,
}


def make_benchmark(name: str, **options: Any) -> Benchmark:
    """Builds a benchmark by name; `options` are those of its class, `None` for its defaults.

    Raises:
        ValueError: for an unknown name, or options that this benchmark does not have.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark={name!r} is not one of {', '.join(BENCHMARKS)}.")
    given = {key: value for key, value in options.items() if value is not None}
    parameters = inspect.signature(BENCHMARKS[name]).parameters
    unknown = [key for key in given if key not in parameters]
    missing = [key for key, known in parameters.items() if known.default is known.empty and key not in given]
    if unknown or missing:
        wrong = f"has no {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(f"The benchmark {name} {wrong}. Its options are {', '.join(parameters)}.")
    return BENCHMARKS[name](**given)


def _detector(detector: Any, names: Sequence[str], device: str | torch.device) -> Detector:
    loaded: Detector = load_detector(detector, device=device) if isinstance(detector, (str, os.PathLike)) else detector
    loaded.check_names(sorted(set(names)))
    return loaded
