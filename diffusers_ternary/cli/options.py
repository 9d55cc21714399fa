# SPDX-License-Identifier: Apache-2.0
"""What the commands make of the same options: prompts, pipelines, call arguments, overrides, device and dtype."""

import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..backend.config import COMPUTE_DTYPES
from ..backend.folder import check_pipeline, explained_loading, pipeline_parts
from ..backend.sources import check_weights, read_source_json
from .console import console


if TYPE_CHECKING:
    from ..evaluation import Scorer

DEMO = "demo"


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """`--prompts`: a file, - for stdin, `template:N` or `datasets:NAME`; see `distillation.prompts.read_prompts`."""
    from ..rollouts import prompts

    return prompts.read_prompts(source, limit=limit)


def load_pipeline(source: str, dtype: torch.dtype) -> Any:
    """Loads a pipeline folder or Hub id, or a variant of the embedded one (`demo`, `demo:rounded`)."""
    from diffusers import DiffusionPipeline

    if is_demo(source):
        from ..demo.variants import TEACHER, find_variant

        return find_variant(source.partition(":")[2] or TEACHER.name).load(dtype)
    index = read_source_json(source, "model_index.json")
    if index is None:
        raise ValueError(
            f"{source} holds no model_index.json, so it is not a pipeline. Give the folder of a pipeline."
        )
    check_pipeline(index, source=source)
    local = pathlib.Path(source).is_dir()
    if local:
        check_weights(source, pipeline_parts(index, source=source))
    with explained_loading(source):
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    if not local:  # the files are in the cache now
        check_weights(source, pipeline_parts(index, source=source))
    return pipeline


def is_demo(source: str) -> bool:
    """Whether a source names the embedded model (or a variant of it)."""
    # A local folder of that name comes first.
    return source.partition(":")[0] == DEMO and not pathlib.Path(source).exists()


def demo_settings(call_kwargs: Mapping[str, Any], steps: int | None, guidance: float | None) -> dict[str, Any]:
    """The embedded model's own call arguments under those that were given."""
    from ..demo.pipeline import DEMO_CALL

    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {name: value for name, value in DEMO_CALL.items() if given.get(name) is None}
    return {**settings, **call_kwargs}


def demo_scorers(prompts: list[str]) -> "dict[str, Scorer]":
    """The embedded model's judge, where the prompts are of its grammar."""
    from ..demo.grammar import attributes_of
    from ..demo.run import judge_scorer

    try:
        for prompt in prompts:
            attributes_of(prompt)
    except ValueError as error:
        console.print(f"The judge is left out: {error}", soft_wrap=True, markup=False)
        return {}
    return {"judge": judge_scorer()}


def parse_call_kwargs(values: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline call: the options that were given, and `--set NAME=VALUE` (values are JSON)."""
    arguments = {name: value for name, value in named.items() if value is not None}
    for value in values or []:
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"--set {value!r} is not NAME=VALUE, e.g. true_cfg_scale=4.0.")
        if name in arguments:
            raise ValueError(f"{name} is given twice. Give it once.")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text  # a plain string
    return arguments


def parse_device(name: str) -> torch.device:
    """`--device`; auto takes the accelerator if there is one.

    Raises:
        ValueError: for what is not a device, and for one that is not in this machine.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    known = ["cpu"]
    if accelerator is not None:
        known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in known:
        raise ValueError(f"--device {name!r} is not available here. Choose from auto, {', '.join(known)}.")
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--dtype`; auto is float32 on a CPU, else bfloat16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"--dtype {name!r} is not one of auto, {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]


def parse_overrides(values: list[str] | None) -> dict[str, str] | None:
    """`--override PATTERN=KIND`, in their order."""
    if not values:
        return None
    parsed = {}
    for value in values:
        pattern, separator, kind = value.rpartition("=")
        if not separator or not pattern:
            raise ValueError(f"--override {value!r} is not PATTERN=KIND, e.g. '*.norm1.linear=int8'.")
        parsed[pattern] = kind
    return parsed
