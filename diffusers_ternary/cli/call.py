# SPDX-License-Identifier: Apache-2.0
"""What a command is about to run, printed before it runs, and the call that a model is known to be made for."""

import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..files import read_json
from .console import console
from .forecast import Forecast


if TYPE_CHECKING:
    import torch


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


def show_plan(
    pipeline: Any,
    prompts: Sequence[str],
    call_kwargs: Mapping[str, Any],
    *further: str,
    device: "torch.device",
    batch_size: int,
    predict: Callable[[Forecast], str],
) -> None:
    """Prints how many prompts are drawn, with which call (size, steps, guidance, what else was given), and a forecast.

    Args:
        pipeline (`DiffusionPipeline`): float, loaded.
        prompts (`Sequence[str]`): that are drawn.
        call_kwargs (`Mapping[str, Any]`): that were given.
        further (`str`): lines.
        device (`torch.device`): where it will run.
        batch_size (`int`): prompts of a call.
        predict (`Callable[[Forecast], str]`): the line of time and memory.
    """
    call = whole_call(pipeline, call_kwargs)
    parts = [f"{len(prompts)} prompts"]
    if call.get("width") and call.get("height"):
        parts.append(f"{call['width']} x {call['height']} pixels")
    if "num_inference_steps" in call:
        parts.append(f"{call['num_inference_steps']} denoising steps")
    shown = {"width", "height", "num_inference_steps"}
    named = [name for name in ("guidance_scale", *call_kwargs) if name in call and name not in shown]
    parts += [f"{name} {call[name]}" for name in dict.fromkeys(named)]
    lines = [f"{type(pipeline).__name__}: {', '.join(parts)}", *further]
    if prompts and Forecast.possible(pipeline):
        lines.append(predict(Forecast(pipeline, prompts, call, device, batch_size=batch_size)))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def whole_call(pipeline: Any, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with the pipeline's defaults, its size too where the pipeline says it."""
    defaults = {name: each.default for name, each in inspect.signature(type(pipeline).__call__).parameters.items()}
    call = {**defaults, **call_kwargs}
    size, factor = (getattr(pipeline, name, None) for name in ("default_sample_size", "vae_scale_factor"))
    if isinstance(size, int) and isinstance(factor, int):
        call.update({name: call.get(name) or size * factor for name in ("width", "height")})
    return call
