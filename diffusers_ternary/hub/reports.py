# SPDX-License-Identifier: Apache-2.0
"""What was measured and how the weights were made, in one form whether it comes as an object, a dict or a file."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from ..files import read_json


RESULT, SHEET = "result.json", "contact_sheet.png"
WEIGHTS_KEY = "student_weights_sha256"
"""Entry that a push adds to evaluation.json: the weights that were measured."""

_AGAINST_TEACHER = (
    ("psnr_db", "psnr", "PSNR to the teacher, dB", "higher"),
    ("ssim", "ssim", "SSIM to the teacher", "higher"),
    ("lpips", "lpips", "LPIPS to the teacher", "lower"),
    ("velocity_nmse", "velocity_nmse", "velocity NMSE along the teacher's trajectories", "lower"),
)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured value of the student.

    Args:
        type (`str`): machine-readable name.
        name (`str`): for people, with unit.
        value (`float`): of the student.
        teacher (`float`, *optional*): of the teacher, where the metric has one.
        better (`str`): `"higher"`, `"lower"` or empty.
    """

    type: str
    name: str
    value: float
    teacher: float | None = None
    better: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        data (`Mapping[str, Any]`): `EvaluationResult.to_dict()`.
        contact_sheet (`Path`, *optional*): the pictures, a PNG file.
    """

    data: Mapping[str, Any]
    contact_sheet: pathlib.Path | None = None

    @property
    def metrics(self) -> list[Metric]:
        """All values that were measured; undefined and infinite ones are left out."""
        data = self.data
        known = [
            Metric(type, name, data[key], better=better)
            for key, type, name, better in _AGAINST_TEACHER
            if data.get(key) is not None
        ]
        scores = [
            Metric(name, name.replace("_", " "), pair["student"], pair["teacher"])
            for name, pair in (data.get("scores") or {}).items()
            if pair["student"] is not None
        ]
        return known + scores

    @property
    def prompts(self) -> list[str]:
        """In the order of the images."""
        return [image["prompt"] for image in self.data.get("images") or []]

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return [image["seed"] for image in self.data.get("images") or []]

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts, in order; the one that reports of calibration and distillation give."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            data = prompt.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def to_eval_results(self, task: str) -> list[EvalResult]:
        """In the form of the card's `model-index`."""
        dataset = f"{len(self.prompts)} prompts, compared with the float model seed by seed"
        return [
            EvalResult(
                task_type=task,
                dataset_type="prompts",
                dataset_name=dataset,
                dataset_revision=self.prompts_sha256,
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=metric.value,
            )
            for metric in self.metrics
        ]


def read_evaluation(report: Any, folder: pathlib.Path) -> Evaluation | None:
    """Takes an `EvaluationResult`, its dictionary, `result.json`, or the folder that `write_report` wrote.

    Args:
        report: see above; `None` gives `None`.
        folder (`Path`): where a contact sheet may be drawn.

    Raises:
        ValueError: if it is something else.
    """
    if report is None:
        return None
    sheet = None
    if isinstance(report, (str, os.PathLike)):
        path = pathlib.Path(report)
        beside = (path if path.is_dir() else path.parent) / SHEET
        sheet = beside if beside.is_file() and not beside.is_symlink() else None
    elif hasattr(report, "contact_sheet"):
        sheet = folder / SHEET
        report.contact_sheet(sheet)
    data = read_record(report, "report", default_name=RESULT)
    images, scores = data.get("images"), data.get("scores") or {}
    complete = isinstance(images, list) and images and all({"prompt", "seed"} <= set(image) for image in images)
    if "psnr_db" not in data or not complete or not all({"student", "teacher"} <= set(s) for s in scores.values()):
        raise ValueError(f"report={_shown(report)} is not a result of evaluate: it lacks psnr_db, images or scores.")
    return Evaluation(data, sheet)


def read_record(record: Any, argument: str, *, default_name: str = "") -> Mapping[str, Any]:
    """A report object (`to_dict`), a mapping, or a JSON file (or a folder that holds `default_name`) as a dictionary.

    Raises:
        ValueError: if it is something else; names the argument.
    """
    if isinstance(record, (str, os.PathLike)):
        path = pathlib.Path(record)
        path = path / default_name if path.is_dir() and default_name else path
        content = read_json(path)
        if content is None:
            raise ValueError(f"{argument}={str(record)!r}: there is no file {path}. Give the JSON file of the report.")
        return content
    if hasattr(record, "to_dict"):
        record = record.to_dict()
    if not isinstance(record, Mapping):
        raise ValueError(f"{argument}={_shown(record)} is neither a report, a dictionary, nor a JSON file.")
    return json.loads(json.dumps(record, default=str))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
