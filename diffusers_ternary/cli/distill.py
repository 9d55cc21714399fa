# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary distill`."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from ..files import parse_size, read_json, remove_folder
from ..files.destinations import check_folder, output_folder
from . import options
from .call import show_plan
from .console import ExitCode, console, escape, explained_errors
from .fields import ConfigOptions, warn_renamed, with_options
from .quiet import quiet_hosts


REPORT = "distill.json"
TRAINING = ConfigOptions(
    "distillation/config.py",
    "DistillConfig",
    "Training",
    leave_out=("calibration", "call_kwargs"),
    formerly={"gradient_accumulation_steps": "--accumulate", "mixed_precision": "--precision"},
)
WEIGHTS = options.weight_options(renamed={"rank": "--start-rank"})  # --rank is of the correction that is trained
CALIBRATION = options.CalibrationOptions("calibration")


@with_options(TRAINING, options.CALL, WEIGHTS, CALIBRATION)
def distill_command(
    source: options.Source,
    destination: options.Destination,
    prompts: Annotated[str, typer.Option(help=f"{options.PROMPTS_HELP} 2,000 or more.", metavar="FILE")],
    held_out_prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts for the evaluation during the run, never trained on. Default: some of --prompts, which are "
            "then left out of training.",
            metavar="FILE",
        ),
    ] = None,
    limit: options.Limit = None,
    lora: options.Adapters = None,
    student: Annotated[
        str | None,
        typer.Option(help="Folder of a packed student to start from. Default: one is calibrated.", metavar="FOLDER"),
    ] = None,
    rounded: Annotated[bool, typer.Option("--rounded", help="Start from rounding instead of calibration.")] = False,
    cache_dir: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of the teacher's latents, to share between runs. Default: in the work folder."),
    ] = None,
    cache: Annotated[pathlib.Path | None, typer.Option("--cache", help="Now --cache-dir.", hidden=True)] = None,
    inference_steps: Annotated[int | None, typer.Option("--inference-steps", help="Now --steps.", hidden=True)] = None,
    work_dir: options.WorkDir = None,
    dtype: options.DType = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")] = False,
    offload: options.Offload = False,
    max_shard_size: options.MaxShardSize = "10GB",
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    **values: Any,
) -> None:
    """Trains a ternary student on its own teacher, with prompts only, and saves it packed.

    The teacher's latents are drawn once and cached. A killed run goes on from its last checkpoint when it is started
    again with the same arguments, and ends with the same weights. DST also gets distill.json: errors on the held-out
    prompts over the run.

    Example: diffusers-ternary distill SRC DST --prompts template:4000 --mode full

    Several GPUs: accelerate launch -m diffusers_ternary.cli distill SRC DST --prompts template:4000 --mode full
    """
    quiet_hosts()
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    with _quiet(state.is_main_process), explained_errors(ExitCode.USAGE):
        from ..distillation import DistillConfig, distill

        if values["held_out"] is not None and not values["held_out"].lstrip("-").isdecimal():
            warn_renamed("--held-out FILE", "--held-out-prompts FILE")
            held_out_prompts, values["held_out"] = held_out_prompts or values["held_out"], None
        if inference_steps is not None:
            warn_renamed("--inference-steps", "--steps")
            values["steps"] = values["steps"] or inference_steps
        elif values["steps"] is not None and values["updates"] is None:
            console.print("note: --steps are denoising steps; the number of training updates is --updates")
        if cache is not None:
            warn_renamed("--cache", "--cache-dir")
        cache_dir = cache_dir or cache
        config = options.ternary_config(WEIGHTS, values)
        settings = options.CALL.given(values, source)
        calibration = None if rounded else CALIBRATION.config(values, {})  # the call is the same
        distill_config = DistillConfig(**TRAINING.given(values), calibration=calibration, call_kwargs=settings)
        adapters = options.parse_adapters(lora)
        parse_size(max_shard_size, name="--max-shard-size")
        torch_dtype = options.parse_dtype(dtype, state.device)
    with _quiet(state.is_main_process), explained_errors():
        lines = options.read_prompts(prompts, limit)
        unseen = None if held_out_prompts is None else options.read_prompts(held_out_prompts)
        run = work_dir or destination.parent / f".{destination.name}.distillation"
        checked: dict[str, Any] = {
            "sources": [source, student, held_out_prompts, prompts, *adapters],
            "work": [work_dir, cache_dir],
            "overwrite": overwrite,
        }
        with _saved(destination, main=state.is_main_process, **checked) as folder:
            pipeline = options.load_pipeline(source, torch_dtype)
            each = f"{distill_config.batch_size} rows"
            training = f"mode {distill_config.mode}: {distill_config.updates} updates of {each}"
            folded = options.fold_adapters(pipeline, adapters)
            show_plan(
                pipeline,
                lines,
                settings,
                *folded,
                training,
                f"checkpoints are kept in {run}",
                device=state.device,
                batch_size=distill_config.batch_size,
                predict=lambda forecast: forecast.distilling(config, distill_config),
            )
            if dry_run:
                raise typer.Exit
            trained = distill(
                options.place_pipeline(pipeline, state.device, offload=offload),
                lines,
                config,
                distill_config,
                run,
                student=student,
                held_out_prompts=unseen,
                cache_dir=cache_dir,
                progress=state.is_main_process,
            )
            if folder is not None:
                options.save_pipeline(trained, folder, dtype=dtype, max_shard_size=max_shard_size)
                shutil.copyfile(run / REPORT, folder / REPORT)
        if state.is_main_process:
            if work_dir is None:
                remove_folder(run)
            _summarize(destination)
        state.wait_for_everyone()


@contextlib.contextmanager
def _quiet(main: bool) -> Iterator[None]:
    """Lets the main process alone print; errors of the others are still seen."""
    before = console.quiet
    console.quiet = not main
    try:
        yield
    finally:
        console.quiet = before


@contextlib.contextmanager
def _saved(destination: pathlib.Path, *, main: bool, **checked: Any) -> Iterator[pathlib.Path | None]:
    """The folder to save into, for the main process; all processes check the destination."""
    if main:
        with output_folder(destination, **checked) as folder:
            yield folder
        return
    check_folder(destination, **checked)
    yield None


def _summarize(destination: pathlib.Path) -> None:
    report: Mapping[str, Any] = read_json(destination / REPORT) or {}
    if report["stopped"]:
        console.print(
            f"stopped early at {escape(report['stopped'])}; the best student so far is saved", soft_wrap=True
        )
    console.print(
        f"held-out velocity error: {_number(report['start_error'])} before, {_number(report['best_error'])} after "
        f"{report['best_step']} of {report['steps']} updates"
    )
    options.show_saved(destination)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5f}"
