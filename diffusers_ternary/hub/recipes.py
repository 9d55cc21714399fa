# SPDX-License-Identifier: Apache-2.0
"""How the weights were made, as the reports of calibration and distillation tell it."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any


CALIBRATION, DISTILLATION = "calibration.json", "distillation.json"
_HASH_SHOWN = 16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One step of making the weights.

    Args:
        method (`str`): a sentence.
        entries (`tuple[tuple[str, str], ...]`): name and value, formatted.
        file (`str`): of the whole report in the repository.
    """

    method: str
    entries: tuple[tuple[str, str], ...]
    file: str


def calibration_recipe(report: Mapping[str, Any]) -> Recipe:
    """Of `CalibrationReport.to_dict()`."""
    return Recipe(
        "**Calibrated** with `diffusers_ternary.calibrate`: codes and scales were chosen on the float model's own "
        "rollouts, from prompts alone, without images or training.",
        tuple(_calibration_entries(report)),
        CALIBRATION,
    )


def distillation_recipe(report: Mapping[str, Any]) -> Recipe:
    """Of the dictionary of a distillation report: its single values, one level deep."""
    return Recipe(
        "**Distilled** with `diffusers_ternary.distill`: trained on the outputs of the float model.",
        tuple(_single_values(report)),
        DISTILLATION,
    )


def _calibration_entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "prompts" in report:
        yield "prompts", _prompts(report)
    settings = report.get("calibration") or {}
    if "seed" in settings:
        yield "seed", str(settings["seed"])
    if settings.get("call_kwargs"):
        yield "pipeline call", ", ".join(f"{name}={value!r}" for name, value in settings["call_kwargs"].items())
    layers = report.get("layers") or []
    errors = [(layer["error_rounded"], layer["error"]) for layer in layers if "error_rounded" in layer]
    if errors:
        before, after = (statistics.fmean(values) for values in zip(*errors, strict=True))
        yield "layers", str(len(errors))
        yield "mean relative squared error of a layer's output", f"{before:.4f} rounded, {after:.4f} calibrated"
    yield from _hash_and_versions(report)


def _single_values(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in report.items():
        if name in ("prompts", "prompts_sha256"):
            continue
        if name not in ("versions", "weights_sha256") and isinstance(value, (str, int, float, bool)):
            yield name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)
    if "prompts" in report:
        yield "prompts", _prompts(report)
    yield from _hash_and_versions(report)


def _prompts(report: Mapping[str, Any]) -> str:
    prompts = report["prompts"]
    digest = report.get("prompts_sha256")
    count = len(prompts) if isinstance(prompts, list) else prompts
    return f"{count} (SHA-256 `{digest[:_HASH_SHOWN]}…`)" if digest else str(count)


def _hash_and_versions(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("weights_sha256"):
        yield "float weights", f"SHA-256 `{report['weights_sha256'][:_HASH_SHOWN]}…`"
    if report.get("versions"):
        yield "versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())
