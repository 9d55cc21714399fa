# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary evaluate`."""

import contextlib
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..extras import check_extra
from ..files.destinations import output_folder
from . import options
from .call import show_plan
from .console import ExitCode, console, explained_errors
from .fields import with_options
from .quiet import quiet_hosts


if TYPE_CHECKING:
    import torch

    from ..evaluation import Scorer


@with_options(options.CALL)
def evaluate_command(
    student: Annotated[str, typer.Argument(help="Pipeline or denoiser folder, Hub id, or demo:rounded.")],
    teacher: Annotated[str, typer.Argument(help="Pipeline folder, Hub id, or demo for the embedded model.")],
    prompts: Annotated[str | None, typer.Option(help=options.PROMPTS_HELP, metavar="FILE")] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="scenes, geneval or t2i-compbench: its prompts and its judge.", metavar="NAME"),
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(help="Images of each prompt of the benchmark.", min=1)
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Detector of geneval and t2i-compbench: folder or Hub id.", metavar="MODEL"),
    ] = None,
    color_model: Annotated[
        str | None, typer.Option(help="CLIP that names the colors of geneval.", metavar="MODEL")
    ] = None,
    vqa: Annotated[
        str | None, typer.Option(help="BLIP that answers questions for t2i-compbench.", metavar="MODEL")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Weights of the detector of scenes. Default: the repository's.", metavar="FILE")
    ] = None,
    report: Annotated[
        pathlib.Path | None, typer.Option(help="Folder to write: HTML page, JSON, images.", metavar="DIR")
    ] = None,
    seed: Annotated[int, typer.Option(help="Prompt i is drawn from seed + i.", min=0)] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Use the first prompts only; of a benchmark, the first of each task.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pipeline call.", min=1)] = 1,
    velocity_prompts: Annotated[int, typer.Option(help="Prompts for the velocity error; 0 = none.", min=0)] = 8,
    clip: Annotated[str | None, typer.Option(help="Local CLIP checkpoint for a CLIP score.", metavar="PATH")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            help="LoRA file to fold into the teacher first, as it was for calibrate or distill (repeatable).",
            metavar="PATH[=SCALE]",
        ),
    ] = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    **values: Any,
) -> None:
    """Compares a student with its teacher on the same prompts and seeds, and writes a report.

    STUDENT may be the folder of a denoiser alone; everything else is then the teacher's.

    Example: diffusers-ternary evaluate flux-ternary black-forest-labs/FLUX.1-dev --prompts prompts.txt --report out
    """
    quiet_hosts()
    with explained_errors(ExitCode.USAGE):
        if (prompts is None) == (benchmark is None):
            raise ValueError("Give --prompts FILE or --benchmark NAME, one of the two.")
        models = {"detector": detector, "clip": color_model, "vqa": vqa, "judge": judge}
        if benchmark is None and (images_per_prompt or any(models.values())):
            raise ValueError("--images-per-prompt, --detector, --color-model, --vqa and --judge need --benchmark.")
        call_kwargs = options.CALL.given(values, teacher, student)
        place = options.parse_device(device)
        torch_dtype = options.parse_dtype(dtype, place)
        adapters = options.parse_adapters(lora)
    with explained_errors(), contextlib.ExitStack() as stack:
        check_extra("torchmetrics", "evaluate")  # before a model is loaded
        from ..evaluation import ClipScore, evaluate
        from ..evaluation.benchmarks import make_benchmark
        from ..evaluation.report_page import fill_report

        lines = None if prompts is None else options.read_prompts(prompts, limit)
        folder = None
        if report is not None:
            if velocity_prompts:
                check_extra("matplotlib", "The report's plot of the velocity error")
            sources = [student, teacher, clip, detector, color_model, vqa, judge, *adapters]
            folder = stack.enter_context(output_folder(report, sources=sources, overwrite=overwrite))
        scorers: dict[str, Scorer] = {} if clip is None else {"clip_score": ClipScore(clip, device=place)}
        task = None
        if benchmark is not None:
            task = make_benchmark(
                benchmark,
                images_per_prompt=images_per_prompt,
                prompts_per_task=limit,
                device=None if benchmark == "scenes" else place,
                **models,
            )
        teacher_pipeline = options.load_pipeline(teacher, torch_dtype)
        folded = options.fold_adapters(teacher_pipeline, adapters)
        teacher_pipeline = teacher_pipeline.to(place)
        student_pipeline = load_student(student, teacher_pipeline, torch_dtype).to(place)
        if lines is not None:
            show_plan(
                teacher_pipeline,
                lines,
                call_kwargs,
                *folded,
                device=place,
                batch_size=batch_size,
                predict=lambda forecast: forecast.drawing([teacher_pipeline, student_pipeline]),
            )
        if options.is_demo(teacher) and lines is not None:
            scorers.update(options.demo_scorers(lines))
        result = evaluate(
            student_pipeline,
            teacher_pipeline,
            lines,
            benchmark=task,
            seed=seed,
            call_kwargs=call_kwargs,
            scorers=scorers,
            batch_size=batch_size,
            velocity_prompts=velocity_prompts,
        )
        if folder is not None:
            fill_report(result, folder, student_name=student, teacher_name=teacher)
    console.print(result)
    if report is not None:
        console.print(f"wrote {report / 'index.html'}", soft_wrap=True, markup=False)


def load_student(source: str, teacher: Any, dtype: "torch.dtype") -> Any:
    """Loads a pipeline, or a denoiser's folder, which takes the place of the teacher's in a copy of its pipeline."""
    path = pathlib.Path(source)
    if not (path / "config.json").is_file() or (path / "model_index.json").is_file():
        return options.load_pipeline(source, dtype)
    from ..backend.components import denoiser_name
    from ..backend.sources import check_weights

    name = denoiser_name(teacher)
    check_weights(source, [""])
    denoiser = type(teacher.components[name]).from_pretrained(source, dtype=dtype)
    return type(teacher)(**{**teacher.components, name: denoiser})
