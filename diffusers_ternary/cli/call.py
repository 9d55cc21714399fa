# SPDX-License-Identifier: Apache-2.0
"""What a command is about to run, printed before it runs, and the call that a model is known to be made for."""

import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import read_json
from .console import console


EMBEDDED = pathlib.Path(__file__).parents[1] / "demo" / "data"
# Reports of this package in the folder of a model, and where they hold the call.
_REPORTS = {"distill.json": "distill_config", "calibration.json": "calibration"}


def known_call(source: str) -> dict[str, Any]:
    """Arguments of the call that a model was made for: the embedded model's, or of the run that wrote its folder."""
    folder = pathlib.Path(source)
    if folder.resolve().is_relative_to(EMBEDDED):
        from ..demo.pipeline import DEMO_CALL

        return dict(DEMO_CALL)
    for file, config in _REPORTS.items():
        call = _section(_section(read_json(folder / file), config), "call_kwargs")
        if call:
            # Other values may be the repr of an object.
            return {name: value for name, value in call.items() if isinstance(value, (bool, int, float))}
    return {}


def _section(report: Any, name: str) -> Mapping[str, Any]:
    """A part of a report; empty where there is none, or the file is of something else."""
    found = report.get(name) if isinstance(report, dict) else None
    return found if isinstance(found, dict) else {}


def show_plan(pipeline: Any, prompts: Sequence[str], call_kwargs: Mapping[str, Any], *further: str) -> None:
    """Prints how many prompts are drawn, and with which call: size, steps, guidance, what else was given."""
    defaults = {name: each.default for name, each in inspect.signature(type(pipeline).__call__).parameters.items()}
    call = {**defaults, **call_kwargs}
    side = _default_side(pipeline)
    width, height = (call.get(name) or side for name in ("width", "height"))
    parts = [f"{len(prompts)} prompts"]
    if width and height:
        parts.append(f"{width} x {height} pixels")
    if "num_inference_steps" in call:
        parts.append(f"{call['num_inference_steps']} denoising steps")
    shown = {"width", "height", "num_inference_steps"}
    named = [name for name in ("guidance_scale", *call_kwargs) if name in call and name not in shown]
    parts += [f"{name} {call[name]}" for name in dict.fromkeys(named)]
    console.print(f"{type(pipeline).__name__}: {', '.join(parts)}", soft_wrap=True, markup=False, highlight=False)
    for line in further:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _default_side(pipeline: Any) -> int | None:
    """Pixels of a side where the call does not say: of the pipelines that say it."""
    size, factor = (getattr(pipeline, name, None) for name in ("default_sample_size", "vae_scale_factor"))
    return size * factor if isinstance(size, int) and isinstance(factor, int) else None
