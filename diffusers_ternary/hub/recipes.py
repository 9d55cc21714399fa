# SPDX-License-Identifier: Apache-2.0
"""How the weights were made, as the reports of calibration and distillation tell it."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any


CALIBRATION, DISTILLATION = "calibration.json", "distill.json"  # as calibrate and distill write them
_ERRORS = ("error_rounded", "error")
_HASH_SHOWN = 16


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


def calibration_recipe(report: Mapping[str, Any]) -> Recipe:
    """Of `CalibrationReport.to_dict()`.

    Raises:
        ValueError: if it is something else.
    """
    _require(report, "calibration", ("layers", "prompts", "prompts_sha256", "weights_sha256"))
    return Recipe(
        "**Calibrated** with `diffusers_ternary.calibrate`: codes and scales were chosen on the float model's own "
        "rollouts, from prompts alone, without images or training.",
        tuple(_calibration_entries(report)),
        CALIBRATION,
        report["prompts_sha256"],
    )


def distillation_recipe(report: Mapping[str, Any]) -> Recipe:
    """Of `DistillReport.to_dict()`.

    Raises:
        ValueError: if it is something else.
    """
    _require(report, "distillation", ("steps", "best_step", "start_error", "best_error", "teacher_sha256"))
    return Recipe(
        "**Distilled** with `diffusers_ternary.distill`: trained on the outputs of the float model.",
        tuple(_distillation_entries(report)),
        DISTILLATION,
        report.get("training_prompts_sha256"),
    )


def _require(report: Mapping[str, Any], argument: str, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in report]
    layers = report.get("layers") or []
    if not missing and not all(isinstance(layer, Mapping) and {"name", *_ERRORS} <= layer.keys() for layer in layers):
        missing = ["errors of layers"]
    if missing:
        raise ValueError(f"{argument}: this is not a report of a {argument}, it has no {', '.join(missing)}.")


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
    if report.get("training_prompts_sha256"):
        yield "training prompts", _hash(report["training_prompts_sha256"])
    if report.get("held_out_prompts_sha256"):
        yield "held-out prompts", _hash(report["held_out_prompts_sha256"])
    if "seed" in (report.get("distill_config") or {}):
        yield "seed", str(report["distill_config"]["seed"])
    yield "teacher's weights", _hash(report["teacher_sha256"])
    yield from _versions(report)


def _hash(digest: str) -> str:
    return f"SHA-256 `{digest[:_HASH_SHOWN]}…`"


def _versions(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("versions"):
        yield "versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())
