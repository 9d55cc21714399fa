# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary distill`."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from ..backend.components import store_in_16_bits
from ..backend.config import TernaryConfig
from ..files import parse_size, read_json, remove_folder
from ..files.destinations import check_folder, output_folder
from ..interop.inspection import inspect_path
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .options import (
    demo_settings,
    is_demo,
    load_pipeline,
    parse_call_kwargs,
    parse_dtype,
    parse_overrides,
    read_prompts,
)


REPORT = "distill.json"


def distill_command(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a float pipeline, or demo.", metavar="SRC")],
    destination: Annotated[pathlib.Path, typer.Argument(help="Folder to write.", metavar="DST")],
    prompts: Annotated[
        str,
        typer.Option(
            help="Text, JSONL, CSV or Parquet file; - for stdin; template:N for N made-up prompts; datasets:NAME. "
            "2,000 or more.",
            metavar="FILE",
        ),
    ],
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Prompts for the evaluation during the run, never trained on. Default: 32 of --prompts, which are "
            "then left out of training.",
            metavar="FILE",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="scales: scales, biases and norms, the cheap one. blockwise: codes of one block after the other. "
            "full: all codes. lora: a low-rank correction on frozen codes."
        ),
    ] = "scales",
    steps: Annotated[int, typer.Option(help="Updates.", min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward on one device.", min=1)] = 32,
    accumulate: Annotated[int, typer.Option(help="Forwards of one update.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of noise, timesteps and the order of the data.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first prompts only.", min=1)] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Folder of a packed student to start from. Default: one is calibrated.", metavar="FOLDER"),
    ] = None,
    rounded: Annotated[bool, typer.Option("--rounded", help="Start from rounding instead of calibration.")] = False,
    rank: Annotated[int, typer.Option(help="Of the correction, in mode lora.", min=1)] = 16,
    train_other: Annotated[
        str, typer.Option(help="Rest of the denoiser to train: none, vectors (biases, norms) or all.")
    ] = "vectors",
    latent_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the codes. Default: follows each layer's mean scale.")
    ] = None,
    scale_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the scales. Default: follows the codes' rate.")
    ] = None,
    block_weight: Annotated[float, typer.Option(help="Weight of the blocks' errors in the loss.")] = 0.5,
    optimizer: Annotated[str, typer.Option(help="auto, adamw or adamw8bit (bitsandbytes).")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Mixed precision: no or bf16. Default: what accelerate launch says.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute activations twice. Default: for models over 500 million weights.")
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Updates between evaluations. Default: a tenth.", min=1)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Updates between checkpoints. Default: a tenth.", min=1)
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio, wandb, ... (repeatable).", metavar="NAME")
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Input columns that share a scale; 0 = one scale per row.", min=0)
    ] = 128,
    scales: Annotated[str, typer.Option(help="Scale layout: auto, group, or double.")] = "auto",
    skip: Annotated[
        list[str] | None, typer.Option(help="Module to keep as it is (name or glob; repeatable).", metavar="PATTERN")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=ternary|int8|keep, before any other rule (repeatable).", metavar="PATTERN=KIND"),
    ] = None,
    component: Annotated[str | None, typer.Option(help="Component to train. Default: the denoiser.")] = None,
    inference_steps: Annotated[int | None, typer.Option(help="Denoising steps of the teacher.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the teacher.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    call: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other argument of the pipeline call (repeatable).", metavar="NAME=VALUE"),
    ] = None,
    cache: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of the teacher's latents, to share between runs. Default: in the work folder."),
    ] = None,
    online_pool: Annotated[
        int, typer.Option(help="Rows that the teacher renews during training, instead of a cache; 0 = cache.", min=0)
    ] = 0,
    work_dir: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where checkpoints are kept for a rerun. Default: a hidden folder beside DST."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the running component on the device.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write.")] = "10GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Trains a ternary student on its own teacher, with prompts only, and saves it packed.

    The teacher's latents are drawn once and cached. A killed run goes on from its last checkpoint when it is started
    again with the same arguments, and ends with the same weights. DST also gets distill.json: errors on the held-out
    prompts over the run.

    Example: diffusers-ternary distill SRC DST --prompts template:4000 --mode full

    Several GPUs: accelerate launch -m diffusers_ternary.cli distill SRC DST --prompts template:4000 --mode full
    """
    from accelerate import PartialState

    from ..calibration import CalibrationConfig
    from ..distillation import DistillConfig, distill
    from .quiet import hide_loading_bars

    state = PartialState(cpu=cpu)
    hide_loading_bars()
    with _quiet(state.is_main_process), explained_errors(ExitCode.USAGE):
        settings = _settings(inference_steps, guidance, height, width, call)
        config = TernaryConfig(
            group_size=group_size or None,
            scales=scales,
            modules_to_not_convert=skip,
            overrides=parse_overrides(override),
            components=None if component is None else [component],
        )
        if is_demo(source):
            settings = demo_settings(settings, inference_steps, guidance)
        distill_config = DistillConfig(
            mode=mode,
            updates=steps,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            seed=seed,
            rank=rank,
            train_other=train_other,
            latent_lr=latent_lr,
            scale_lr=scale_lr,
            block_weight=block_weight,
            optimizer=optimizer,
            mixed_precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            trackers=tuple(tracker or ()),
            online_pool=online_pool,
            calibration=None if rounded else CalibrationConfig(),
            call_kwargs=settings,
        )
        parse_size(max_shard_size, name="--max-shard-size")
        torch_dtype = parse_dtype(dtype, state.device)
    with _quiet(state.is_main_process), explained_errors():
        lines = read_prompts(prompts, limit)
        unseen = None if held_out is None else read_prompts(held_out)
        run = work_dir or destination.parent / f".{destination.name}.distillation"
        checked: dict[str, Any] = {
            "sources": [source, student, held_out, prompts],
            "work": [work_dir, cache],
            "overwrite": overwrite,
        }
        with _saved(destination, main=state.is_main_process, **checked) as folder:
            pipeline = load_pipeline(source, torch_dtype)
            if offload:
                pipeline.enable_model_cpu_offload(device=state.device)
            else:
                pipeline = pipeline.to(state.device)
            trained = distill(
                pipeline,
                lines,
                config,
                distill_config,
                run,
                student=student,
                held_out_prompts=unseen,
                cache_dir=cache,
                progress=state.is_main_process,
            )
            if folder is not None:
                if dtype == "auto":
                    store_in_16_bits(trained)
                trained.save_pretrained(folder, max_shard_size=max_shard_size)
                shutil.copyfile(run / REPORT, folder / REPORT)
        if state.is_main_process:
            if work_dir is None:
                remove_folder(run)
            _summarize(destination)
        state.wait_for_everyone()


def _settings(
    inference_steps: int | None, guidance: float | None, height: int | None, width: int | None, call: list[str] | None
) -> dict[str, Any]:
    named = {"num_inference_steps": inference_steps, "guidance_scale": guidance, "height": height, "width": width}
    return parse_call_kwargs(call, named)


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
    for part in inspect_path(destination):
        if part.format_version is None:
            continue
        console.print(
            f"{escape(part.name)}: {part.packed_bits_per_weight:.3f} bits per converted weight, "
            f"{format_bytes(part.bytes)} ({part.bytes_16bit / part.bytes:.2f}x smaller than 16 bits)",
            soft_wrap=True,
        )
    if report["stopped"]:
        console.print(
            f"stopped early at {escape(report['stopped'])}; the best student so far is saved", soft_wrap=True
        )
    console.print(
        f"held-out velocity error: {_number(report['start_error'])} before, {_number(report['best_error'])} after "
        f"{report['best_step']} of {report['steps']} updates"
    )
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5f}"
