# SPDX-License-Identifier: Apache-2.0
"""Where training starts: the teacher's denoiser, checked, and a packed student of it."""

import copy
import dataclasses
import inspect
import os
import pathlib
from typing import Any, TypeAlias

from diffusers import DiffusionPipeline
from torch import nn

from ..backend import packed_layers
from ..backend.config import TernaryConfig
from ..backend.quantize import quantize
from ..calibration import calibrate
from .config import DistillConfig
from .recording import TeacherRecorder
from .trainee import ternary_layers


StudentSource: TypeAlias = DiffusionPipeline | nn.Module | str | os.PathLike[str]


def teacher_component(pipeline: Any, config: TernaryConfig) -> str:
    """Name of the denoiser to distill.

    Raises:
        TypeError: if `pipeline` is not a pipeline.
        ValueError: if there is no denoiser, more than one, or it is quantized.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"distill takes a diffusers pipeline as teacher, got {type(pipeline).__name__}.")
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    selected = [name for name in modules if config.selects(name)]
    if len(selected) != 1:
        raise ValueError(
            f"distill trains one component at a time, and {type(pipeline).__name__} has "
            f"{', '.join(selected) or 'none'} to train. Choose with TernaryConfig(components=[...]) from "
            f"{', '.join(modules)}."
        )
    denoiser = modules[selected[0]]
    if getattr(denoiser, "quantization_method", None) is not None or packed_layers(denoiser):
        raise ValueError(
            f"The teacher's {selected[0]} is itself quantized. A student learns what its teacher still knows: load "
            "the float weights."
        )
    return selected[0]


def with_denoiser(pipeline: DiffusionPipeline, component: str, denoiser: nn.Module) -> DiffusionPipeline:
    """A pipeline of the same parts with another denoiser."""
    # Not from_pipe: it leaves out components whose class is not the annotated one, and casts them all.
    options = [name for name in inspect.signature(type(pipeline).__init__).parameters if name in pipeline.config]
    kept = {name: pipeline.config[name] for name in options if name not in pipeline.components}
    return type(pipeline)(**{**pipeline.components, **kept, component: denoiser})


def make_student(
    recorder: TeacherRecorder, config: TernaryConfig, distill_config: DistillConfig, *, work_dir: pathlib.Path
) -> nn.Module:
    """A calibrated (or rounded) copy of the teacher's denoiser."""
    denoiser = copy.deepcopy(recorder.denoiser)
    calibration = distill_config.calibration
    if calibration is None:
        return quantize(denoiser, config)
    if not calibration.call_kwargs:
        calibration = dataclasses.replace(calibration, call_kwargs=distill_config.call_kwargs)
    copied = with_denoiser(recorder.pipeline, recorder.component, denoiser)
    prompts = recorder.rollouts.prompts[: distill_config.calibration_prompts]
    calibrate(copied, prompts, config, calibration, work_dir=work_dir)
    return copied.components[recorder.component]


def given_student(student: StudentSource, component: str, teacher: nn.Module) -> nn.Module:
    """The packed denoiser in what the user gave as a start: a pipeline, a denoiser, or a folder of either.

    Raises:
        ValueError: if it holds no packed denoiser of the teacher's architecture.
    """
    found: Any = student
    if isinstance(found, (str, os.PathLike)):
        folder = pathlib.Path(found)
        inner = folder / component if (folder / "model_index.json").is_file() else folder
        if not (inner / "config.json").is_file():
            raise ValueError(f"student={str(student)!r} is not a folder of a packed pipeline or {component}.")
        found = type(teacher).from_pretrained(inner, dtype=teacher.dtype)  # type: ignore[attr-defined]
    elif isinstance(found, DiffusionPipeline):
        found = found.components.get(component)
    if not isinstance(found, nn.Module) or not ternary_layers(found):
        raise ValueError(
            f"The student's {component} has no ternary layers. Quantize or calibrate it first, or leave student out."
        )
    check_same_architecture(found, teacher)
    return found


def check_same_architecture(student: nn.Module, teacher: nn.Module) -> None:
    """Raises unless both denoisers are of one class, with the same layers in the same shapes.

    Raises:
        ValueError: names the first difference.
    """
    if type(student) is not type(teacher):
        raise ValueError(f"The student is a {type(student).__name__}, the teacher a {type(teacher).__name__}.")
    packed = packed_layers(student)
    theirs = dict(teacher.named_parameters())
    ours = {
        name: list(parameter.shape)
        for name, parameter in student.named_parameters()
        if name.rpartition(".")[0] not in packed
    }
    for name, layer in packed.items():
        ours[f"{name}.weight"] = [layer.spec.out_features, layer.spec.in_features]
        if layer.bias is not None:
            ours[f"{name}.bias"] = list(layer.bias.shape)
    for name in sorted(ours.keys() | theirs.keys()):
        own, other = ours.get(name), list(theirs[name].shape) if name in theirs else None
        if own != other:
            raise ValueError(
                f"Teacher and student differ in architecture: {name} is {own or 'missing'} in the student and "
                f"{other or 'missing'} in the teacher. Give the teacher that the student was made from."
            )
