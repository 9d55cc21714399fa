# SPDX-License-Identifier: Apache-2.0
"""Whether two pipelines may be compared: the same class, denoiser architecture and scheduler."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..backend.components import denoiser_of


_MISSING = object()


def check_comparable(student: DiffusionPipeline, teacher: DiffusionPipeline) -> None:
    """Checks that differences between the images come from the weights alone.

    Raises:
        TypeError: if one is not a diffusers pipeline.
        ValueError: names the first difference of class, architecture or scheduler, and the remedy.
    """
    for role, pipeline in (("student", student), ("teacher", teacher)):
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"The {role} is a {type(pipeline).__name__}, not a diffusers pipeline. Load it with "
                "DiffusionPipeline.from_pretrained(...)."
            )
    _check_same_class("pipeline", student, teacher, "Compare pipelines of the same class.")
    remedy = "The student must be made from this teacher; check that both come from the same model."
    models = denoiser_of(student), denoiser_of(teacher)
    _check_same_class("denoiser", *models, remedy)
    _check_same_config("denoiser", *models, remedy)
    for role, model in zip(("student", "teacher"), models, strict=True):
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"The {role}'s {type(model).__name__} has a feature cache enabled, so its output depends on earlier "
                "steps. Call disable_cache() on it first."
            )
    schedulers = student.scheduler, teacher.scheduler
    remedy = (
        "Use one schedule for both: student.scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config)"
    )
    _check_same_class("scheduler", *schedulers, remedy)
    _check_same_config("scheduler", *schedulers, remedy)


def _check_same_class(what: str, student: Any, teacher: Any, remedy: str) -> None:
    if type(student) is not type(teacher):
        raise ValueError(
            f"The student's {what} is a {type(student).__name__}, the teacher's a {type(teacher).__name__}. {remedy}"
        )


def _check_same_config(what: str, student: Any, teacher: Any, remedy: str) -> None:
    ours, theirs = _settings(student), _settings(teacher)
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, _MISSING), theirs.get(name, _MISSING)
        if mine != other:
            values = ["unset" if value is _MISSING else repr(value) for value in (mine, other)]
            raise ValueError(
                f"The {what}s differ: {name} is {values[0]} in the student's {type(student).__name__} and {values[1]} "
                f"in the teacher's. {remedy}"
            )


def _settings(component: Any) -> dict[str, Any]:
    config: Mapping[str, Any] = getattr(component, "config", {})
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if not name.startswith("_") and name != "quantization_config"
    }
