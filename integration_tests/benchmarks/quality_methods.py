# SPDX-License-Identifier: Apache-2.0
"""The rows of quality.py: ways to low-bit weights, and the folder in which each keeps what it made.

Weights are all that differs: a row is drawn by the stock model from weights in bfloat16, which is several times faster
on a CPU than the packed layers; the rows called "packed" show that it makes no difference.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from quality_peers import PEERS
from quality_table import slug
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import bits_per_weight, packed_layers, plan_pipeline
from diffusers_ternary.backend.dequantize import dequantize_layers
from diffusers_ternary.calibration import SolverConfig
from diffusers_ternary.files import new_folder
from diffusers_ternary.rollouts import fingerprint


sys.path.append(str(Path(__file__).parents[2] / "examples" / "scenes"))
from students import calibrate_student, distill_student


# Four times the width of pixel people: 256 columns and more take rotations of 256.
ROTATED = TernaryConfig(activation_dtype="none", hadamard=256)


@dataclasses.dataclass(frozen=True)
class Effort:
    """What the rows may spend.

    Args:
        calibration_prompts (`int`), distillation_prompts (`int`): for the rows that look at prompts.
        scale_steps (`int`), full_steps (`int`): updates of the distilled rows.
    """

    calibration_prompts: int
    distillation_prompts: int
    scale_steps: int
    full_steps: int


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted denoiser in a folder.

    Args:
        folder (`Path`): holds `model/`.
        bits_per_weight (`float`): as stored, over the layers that a plain `TernaryConfig` converts.
        seconds (`float`): of the conversion, without the rows that it starts from.
    """

    folder: Path
    bits_per_weight: float
    seconds: float

    def load(self, pipeline: DiffusionPipeline, *, packed: bool) -> nn.Module:
        """The denoiser in bfloat16; packed layers as stock ones unless `packed`."""
        denoiser = type(pipeline.transformer).from_pretrained(self.folder / "model", dtype=torch.bfloat16)
        if not packed:
            dequantize_layers(denoiser, torch.bfloat16)
        return denoiser


class Workshop:
    """Converts teachers, once per row.

    Args:
        load (`Callable[[], DiffusionPipeline]`): makes a fresh teacher in bfloat16.
        work (`Path`): for what rows made and for interrupted runs.
        effort ([`Effort`]): what they may spend.
    """

    def __init__(self, load: Callable[[], DiffusionPipeline], work: Path, effort: Effort) -> None:
        self.load, self.work, self.effort = load, work, effort

    def convert(self, row: str) -> Conversion:
        """Makes a row's denoiser, or finds the one that was made before."""
        method = METHODS[row]
        if method.same_as is not None:
            return self.convert(method.same_as)
        folder = self.work / "converted" / slug(f"{row} {method.how(self.effort)}".strip())
        notes = folder / "conversion.json"
        if not notes.exists():
            with new_folder(folder) as temporary:
                self._make(method, temporary)
        made = json.loads(notes.read_text(encoding="utf-8"))
        return Conversion(folder, made["bits_per_weight"], made["seconds"])

    def _make(self, method: "Method", folder: Path) -> None:
        pipeline = self.load()
        start = None if method.starts_from is None else self.convert(method.starts_from)
        before = seconds()
        bits = method.apply(pipeline, self, start)
        spent = seconds() - before
        pipeline.transformer.save_pretrained(folder / "model")
        notes = {"bits_per_weight": bits, "seconds": round(spent, 1)}
        (folder / "conversion.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to low-bit weights.

    Args:
        apply (`Callable[[DiffusionPipeline, Workshop, Conversion | None], float]`): converts a pipeline's transformer
            in place and returns the stored bits per weight.
        how (`Callable[[Effort], str]`): what it spends, for the table.
        starts_from (`str`, *optional*): row whose conversion it goes on from.
        same_as (`str`, *optional*): row whose conversion is shown, drawn by its packed layers.
        missing (`tuple[str, ...]`): packages without which it cannot run here.
    """

    apply: Callable[[DiffusionPipeline, Workshop, Conversion | None], float]
    how: Callable[[Effort], str] = lambda effort: ""
    starts_from: str | None = None
    same_as: str | None = None
    missing: tuple[str, ...] = ()


def seconds() -> float:
    """CPU time; where a GPU does the work, wall time."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _bits(pipeline: DiffusionPipeline) -> float:
    return bits_per_weight({name: layer.spec for name, layer in packed_layers(pipeline.transformer).items()})


def _rounding(rule: str) -> Method:
    def apply(pipeline: DiffusionPipeline, _workshop: Workshop, _start: Conversion | None) -> float:
        quantize(pipeline, TernaryConfig(rounding=rule, activation_dtype="none"))
        return _bits(pipeline)

    return Method(apply)


def _calibrated(config: TernaryConfig | None = None, solver: SolverConfig | None = None, **settings: object) -> Method:
    # Budgets of different sizes share their layers.
    key = fingerprint(config=config and config.to_dict(), solver=solver and vars(solver), settings=sorted(settings))

    def apply(pipeline: DiffusionPipeline, workshop: Workshop, _start: Conversion | None) -> float:
        report = calibrate_student(
            pipeline,
            prompts=workshop.effort.calibration_prompts,
            config=config,
            solver=solver or SolverConfig(),
            work_dir=workshop.work / "layers" / key[:12],
            **settings,
        )
        return report.bits_per_weight

    return Method(apply, how=lambda effort: f"{effort.calibration_prompts} prompts")


def _distilled(mode: str, *, starts_from: str) -> Method:
    def how(effort: Effort) -> str:
        steps = effort.scale_steps if mode == "scales" else effort.full_steps
        return f"{steps} updates on {effort.distillation_prompts} prompts; calibrated on {effort.calibration_prompts}"

    def apply(pipeline: DiffusionPipeline, workshop: Workshop, start: Conversion | None) -> float:
        assert start is not None
        effort = workshop.effort
        student = distill_student(
            pipeline,
            start.load(pipeline, packed=True),
            workshop.work / "runs" / slug(f"{mode} {how(effort)}"),
            mode=mode,
            steps=effort.scale_steps if mode == "scales" else effort.full_steps,
            prompts=effort.distillation_prompts,
            cache_dir=workshop.work / "latents" / str(effort.distillation_prompts),
        )
        pipeline.transformer = student.transformer
        return _bits(pipeline)

    return Method(apply, how=how, starts_from=starts_from)


def _packed(row: str, method: Method) -> Method:
    return dataclasses.replace(method, same_as=row)


def _peer(name: str) -> Method:
    def apply(pipeline: DiffusionPipeline, _workshop: Workshop, _start: Conversion | None) -> float:
        plan = plan_pipeline(pipeline, TernaryConfig())["transformer"]
        return PEERS[name].apply(pipeline.transformer, list(plan.kinds))

    return Method(apply, missing=tuple(PEERS[name].missing))


def _methods() -> dict[str, Method]:
    plain = SolverConfig(refit=False, descent_passes=0, starts=1)
    calibrated = _calibrated()
    return {
        "absmean": _rounding("absmean"),
        "twn": _rounding("twn"),
        "gptq": _calibrated(solver=plain, correct_bias=False, end_loss=False),
        "calibrated": calibrated,
        "calibrated, packed": _packed("calibrated", calibrated),
        "calibrated, rotated": _calibrated(ROTATED),
        "calibrated, rotated, sequential": _calibrated(ROTATED, sequential=True),
        "budget 1.9 bits": _calibrated(ROTATED, size_budget="1.9 bits"),
        "budget 2.1 bits": _calibrated(ROTATED, size_budget="2.1 bits"),
        "distilled scales": _distilled("scales", starts_from="calibrated"),
        "distilled full": _distilled("full", starts_from="calibrated"),
        **{name: _peer(name) for name in PEERS},
    }


METHODS = _methods()
