# SPDX-License-Identifier: Apache-2.0
"""What was measured and how the weights were made, in one form whether it comes as an object, a dict or a file.

Reports that speak of other weights than these are refused.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from ..files import read_json
from ..rollouts import prompts_sha256
from .source import Source


CALIBRATION, DISTILLATION = "calibration.json", "distill.json"  # as calibrate and distill write them
EVALUATION, RESULT, SHEET = "evaluation.json", "result.json", "contact_sheet.png"
WEIGHTS_KEY = "student_weights_sha256"
"""Entry that a push adds to evaluation.json: the weights that were measured."""

_AGAINST_TEACHER = (
    ("psnr_db", "psnr", "PSNR to the teacher, dB", "higher"),
    ("ssim", "ssim", "SSIM to the teacher", "higher"),
    ("lpips", "lpips", "LPIPS to the teacher", "lower"),
    ("velocity_nmse", "velocity_nmse", "velocity NMSE along the teacher's trajectories", "lower"),
)
_ERRORS = ("error_rounded", "error")
_OF_ADAPTER = ("name", "scale", "sha256")
_REQUIRED = {
    "calibration": ("layers", "prompts", "prompts_sha256", "weights_sha256"),
    "distillation": ("steps", "best_step", "start_error", "best_error", "teacher_sha256"),
}
_OTHER = "It was made from other weights than these; give the report of these, or leave it out."


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
        known = [
            Metric(type, name, self.data[key], better=better)
            for key, type, name, better in _AGAINST_TEACHER
            if self.data.get(key) is not None
        ]
        scores = (self.data.get("scores") or {}).items()
        return known + [
            Metric(name, name.replace("_", " "), pair["student"], pair["teacher"])
            for name, pair in scores
            if pair["student"] is not None
        ]

    @property
    def prompts(self) -> list[str]:
        """One per image."""
        return [image["prompt"] for image in self.data.get("images") or []]

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return [image["seed"] for image in self.data.get("images") or []]

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts, in order; the one that reports of calibration and distillation give."""
        return prompts_sha256(self.prompts)

    def to_eval_results(self, task: str) -> list[EvalResult]:
        """In the form of the card's `model-index`."""
        return [
            EvalResult(
                task_type=task,
                dataset_type="prompts",
                dataset_name=f"{len(self.prompts)} prompts, compared with the float model seed by seed",
                dataset_revision=self.prompts_sha256,
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=metric.value,
            )
            for metric in self.metrics
        ]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One step of making the weights.

    Args:
        method (`str`): a sentence.
        entries (`tuple[tuple[str, str], ...]`): name and value, formatted.
        file (`str`): of the whole report in the repository.
        prompts_sha256 (`str`, *optional*): hash of the prompts that the weights were made with.
    """

    method: str
    entries: tuple[tuple[str, str], ...]
    file: str
    prompts_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Reports:
    """The reports that go with the weights, each `None` if there is none: of `evaluate`, `calibrate` and `distill`."""

    evaluation: Evaluation | None
    calibration: Mapping[str, Any] | None
    distillation: Mapping[str, Any] | None

    @property
    def adapters(self) -> list[Mapping[str, Any]]:
        """Name, scale and SHA-256 of each adapter file that was folded into the float model before."""
        made_by = self.distillation if self.distillation is not None else self.calibration
        return list((made_by or {}).get("adapters") or ())

    @property
    def recipes(self) -> list[Recipe]:
        """How the weights were made, step by step."""
        recipes = []
        if self.calibration is not None:
            method = (
                "**Calibrated** with `diffusers_ternary.calibrate`: codes and scales were chosen on the float model's "
                "own rollouts, from prompts alone, without images or training."
            )
            entries = tuple(_calibration_entries(self.calibration))
            recipes.append(Recipe(method, entries, CALIBRATION, self.calibration["prompts_sha256"]))
        if self.distillation is not None:
            method = "**Distilled** with `diffusers_ternary.distill`: trained on the outputs of the float model."
            entries = tuple(_distillation_entries(self.distillation))
            recipes.append(Recipe(method, entries, DISTILLATION, self.distillation.get("training_prompts_sha256")))
        return recipes


def read_reports(source: Source, folder: pathlib.Path, *, report: Any, calibration: Any, distillation: Any) -> Reports:
    """Reads the reports that were given, or those in the source's folder, and compares them with the weights.

    Args:
        source ([`Source`]): the weights.
        folder (`Path`): where a contact sheet may be drawn.
        report: an `EvaluationResult`, its dictionary, `result.json`, or the folder that `write_report` wrote.
        calibration, distillation: a report, its dictionary, or its file.

    Raises:
        ValueError: if one is something else, or of other weights.
    """
    evaluation = _read_evaluation(source.files.get(EVALUATION) if report is None else report, folder)
    if evaluation is not None:
        _check_evaluation(source, evaluation)
    records: dict[str, Mapping[str, Any] | None] = {}
    for argument, given, file in (
        ("calibration", calibration, CALIBRATION),
        ("distillation", distillation, DISTILLATION),
    ):
        record = source.files.get(file) if given is None else given
        records[argument] = None if record is None else _read_record(record, argument)
        if record is not None:
            _check_record(source, argument, records[argument] or {})
    return Reports(evaluation, **records)


def _read_evaluation(report: Any, folder: pathlib.Path) -> Evaluation | None:
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
    data = _read_record(report, "report", default_name=RESULT)
    images, scores = data.get("images"), data.get("scores") or {}
    complete = isinstance(images, list) and images and all({"prompt", "seed"} <= set(image) for image in images)
    if "psnr_db" not in data or not complete or not all({"student", "teacher"} <= set(s) for s in scores.values()):
        raise ValueError(f"report={_shown(report)} is not a result of evaluate: it lacks psnr_db, images or scores.")
    return Evaluation(data, sheet)


def _read_record(record: Any, argument: str, *, default_name: str = "") -> Mapping[str, Any]:
    """A report object (`to_dict`), a mapping, a JSON file, or a folder that holds `default_name`, as a dictionary."""
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


def _check_evaluation(source: Source, evaluation: Evaluation) -> None:
    pipeline, measured = evaluation.data.get("pipeline"), evaluation.data.get(WEIGHTS_KEY)
    if source.is_pipeline and pipeline and pipeline != source.class_name:
        raise ValueError(f"report: it compares pipelines of class {pipeline}, not {source.class_name}. {_OTHER}")
    if measured not in (None, source.weights_sha256):
        raise ValueError(f"report: it measured weights of hash {measured[:16]}…, not these. {_OTHER}")


def _check_record(source: Source, argument: str, record: Mapping[str, Any]) -> None:
    bits, layers = record.get("bits_per_weight"), record.get("layers") or []
    missing = [key for key in _REQUIRED[argument] if key not in record]
    if not missing and not all(isinstance(layer, Mapping) and {"name", *_ERRORS} <= layer.keys() for layer in layers):
        missing = ["errors of layers"]
    adapters = record.get("adapters") or []
    if not missing and not (
        isinstance(adapters, list)
        and all(isinstance(each, Mapping) and {*_OF_ADAPTER} <= each.keys() for each in adapters)
    ):
        missing = [f"{', '.join(_OF_ADAPTER)} of adapters"]
    if missing:
        raise ValueError(f"{argument}: this is not a report of a {argument}, it has no {', '.join(missing)}.")
    # With a size budget, layers that were kept count as well; the layers are compared one by one then.
    if (
        not record.get("sensitivity")
        and isinstance(bits, (int, float))
        and not math.isclose(bits, source.bits_per_weight, rel_tol=1e-4)
    ):
        raise ValueError(
            f"{argument}: it says {bits:.4f} bits per weight, the files hold {source.bits_per_weight:.4f}. {_OTHER}"
        )
    specs = source.specs
    for layer in layers:
        name = str(layer.get("name"))
        # A model on its own does not know what its pipeline calls it.
        spec = specs.get(name) or specs.get(f".{name.partition('.')[2]}")
        if spec is None:
            raise ValueError(f"{argument}: the files hold no packed layer {name}. {_OTHER}")
        stored = {"hadamard": 0, "rank": 0, "column_scales": False, **spec.to_json()}
        wrong = {key: layer[key] for key in stored if key in layer and layer[key] != stored[key]}
        if wrong:
            found = {key: stored[key] for key in wrong}
            raise ValueError(f"{argument}: {name} is described as {wrong}, but the files hold {found}. {_OTHER}")


def _calibration_entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "prompts", f"{report['prompts']} ({_hash(report['prompts_sha256'])})"
    settings = report.get("calibration") or {}
    if "seed" in settings:
        yield "seed", str(settings["seed"])
    if settings.get("call_kwargs"):
        yield "pipeline call", ", ".join(f"{name}={value!r}" for name, value in settings["call_kwargs"].items())
    errors = [[layer[key] for key in _ERRORS] for layer in report["layers"]]
    if errors:
        before, after = (statistics.fmean(values) for values in zip(*errors, strict=True))
        yield "layers", str(len(errors))
        yield "mean relative squared error of a layer's output", f"{before:.4f} rounded, {after:.4f} calibrated"
    for component, error in (report.get("velocity_nmse") or {}).items():
        yield f"error of the whole {component}'s output (NMSE)", f"{error:.4g}"
    yield "float weights", _hash(report["weights_sha256"])
    yield from _versions(report)


def _distillation_entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "updates", f"{report['steps']}, best after {report['best_step']}"
    if report.get("stopped"):
        yield "stopped early", str(report["stopped"])
    errors = (report["start_error"], report["best_error"])
    if None not in errors:
        yield "held-out error of the denoiser's output (NMSE)", f"{errors[0]:.4g} before, {errors[1]:.4g} after"
    for phase, count in (report.get("trained_parameters") or {}).items():
        yield f"trained in phase {phase}", f"{count:,} parameters"
    for key, name in (
        ("training_prompts_sha256", "training prompts"),
        ("held_out_prompts_sha256", "held-out prompts"),
    ):
        if report.get(key):
            yield name, _hash(report[key])
    if "seed" in (report.get("distill_config") or {}):
        yield "seed", str(report["distill_config"]["seed"])
    yield "teacher's weights", _hash(report["teacher_sha256"])
    yield from _versions(report)


def _hash(digest: str) -> str:
    return f"SHA-256 `{digest[:16]}…`"


def _versions(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("versions"):
        yield "versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())
