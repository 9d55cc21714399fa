# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary evaluate`."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..config.ternary_config import COMPUTE_DTYPES
from ..sources import save_atomically
from .console import console, explained_errors


if TYPE_CHECKING:
    from ..evaluation import Scorer

DEMO = "demo"


def evaluate_command(
    student: Annotated[str, typer.Argument(help="Pipeline or denoiser folder, Hub id, or demo:rounded.")],
    teacher: Annotated[str, typer.Argument(help="Pipeline folder, Hub id, or demo for the embedded model.")],
    prompts: Annotated[str, typer.Option(help="Text file, UTF-8, one prompt a line; - for stdin.", metavar="FILE")],
    report: Annotated[
        pathlib.Path | None, typer.Option(help="Folder to write: HTML page, JSON, images.", metavar="DIR")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the pipeline.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    call: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other argument of the pipeline call (repeatable).", metavar="NAME=VALUE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Prompt i is drawn from seed + i.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first prompts only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pipeline call.", min=1)] = 1,
    velocity_prompts: Annotated[int, typer.Option(help="Prompts for the velocity error; 0 = none.", min=0)] = 8,
    clip: Annotated[str | None, typer.Option(help="Local CLIP checkpoint for a CLIP score.", metavar="PATH")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
) -> None:
    """Compares a student with its teacher on the same prompts and seeds, and writes a report.

    STUDENT may be the folder of a denoiser alone; everything else is then the teacher's.

    Example: diffusers-ternary evaluate flux-ternary black-forest-labs/FLUX.1-dev --prompts prompts.txt --report out
    """
    from ..evaluation import ClipScore, MissingExtraError, evaluate, write_report
    from .quiet import hide_loading_bars

    with explained_errors(), contextlib.ExitStack() as stack:
        lines = read_prompts(prompts, limit)
        call_kwargs = _call_kwargs(call, {"height": height, "width": width})
        place = _device(device)
        torch_dtype = _dtype(dtype, place)
        folder = None if report is None else stack.enter_context(save_atomically(report, overwrite=overwrite))
        hide_loading_bars()
        scorers: dict[str, Scorer] = {} if clip is None else {"clip_score": ClipScore(clip, device=place)}
        teacher_pipeline = load_pipeline(teacher, torch_dtype).to(place)
        student_pipeline = load_student(student, teacher_pipeline, torch_dtype).to(place)
        if _is_demo(teacher):
            call_kwargs, judge = _demo_settings(call_kwargs, lines, steps, guidance)
            scorers.update(judge)
        try:
            result = evaluate(
                student_pipeline,
                teacher_pipeline,
                lines,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                call_kwargs=call_kwargs,
                scorers=scorers,
                batch_size=batch_size,
                velocity_prompts=velocity_prompts,
            )
            if folder is not None:
                write_report(result, folder, student_name=student, teacher_name=teacher)
        except MissingExtraError as error:
            raise ValueError(str(error)) from error
    console.print(result)
    if report is not None:
        console.print(f"wrote {report / 'index.html'}", soft_wrap=True, markup=False)


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """Reads prompts, one a line; blank lines are skipped.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8, or holds no prompt.
    """
    name = "stdin" if source == "-" else source
    if source == "-":
        data = sys.stdin.buffer.read()
    else:
        path = pathlib.Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"--prompts {source}: there is no such file. Give a text file, or - for stdin.")
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name} is not UTF-8 (line {line}: {error.reason}). Save it as UTF-8 text.") from error
    # Not splitlines(): it also breaks at characters that belong into a prompt.
    lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{name} holds no prompts. Write one per line.")
    return prompts[:limit]


def load_pipeline(source: str, dtype: torch.dtype) -> Any:
    """Loads a pipeline folder or Hub id, or a variant of the embedded one (`demo`, `demo:rounded`)."""
    from diffusers import DiffusionPipeline

    if _is_demo(source):
        from ..demo.variants import TEACHER, find_variant

        return find_variant(source.partition(":")[2] or TEACHER.name).load(dtype)
    path = pathlib.Path(source)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{source} holds no model_index.json, so it is no pipeline. Give the folder of a pipeline.")
    return DiffusionPipeline.from_pretrained(source, dtype=dtype)


def load_student(source: str, teacher: Any, dtype: torch.dtype) -> Any:
    """Loads a pipeline, or a denoiser's folder, which takes the place of the teacher's in a copy of its pipeline."""
    path = pathlib.Path(source)
    if not (path / "config.json").is_file() or (path / "model_index.json").is_file():
        return load_pipeline(source, dtype)
    from ..evaluation.comparable import DENOISERS, denoiser_of

    current: Any = denoiser_of(teacher)
    denoiser = type(current).from_pretrained(source, dtype=dtype)
    name = next(name for name in DENOISERS if getattr(teacher, name, None) is current)
    return type(teacher)(**{**teacher.components, name: denoiser})


def _is_demo(source: str) -> bool:
    # A local folder of that name comes first.
    return source.partition(":")[0] == DEMO and not pathlib.Path(source).exists()


def _demo_settings(
    call_kwargs: Mapping[str, Any], prompts: list[str], steps: int | None, guidance: float | None
) -> "tuple[dict[str, Any], dict[str, Scorer]]":
    """The embedded model's own call arguments, and its judge where the prompts are of its grammar."""
    from ..demo.grammar import attributes_of
    from ..demo.pipeline import DEMO_CALL
    from ..demo.run import judge_scorer

    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {name: value for name, value in DEMO_CALL.items() if given.get(name) is None}
    settings.update(call_kwargs)
    try:
        for prompt in prompts:
            attributes_of(prompt)
    except ValueError as error:
        console.print(f"The judge is left out: {error}", soft_wrap=True, markup=False)
        return settings, {}
    return settings, {"judge": judge_scorer()}


def _call_kwargs(values: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
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


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device: {str(error).splitlines()[0]}") from error


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"--dtype {name!r} is not one of auto, {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]
