# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary calibrate`."""

import pathlib
from typing import Annotated

import typer

from ..backend.components import store_in_16_bits
from ..backend.config import TernaryConfig
from ..extras import MissingExtraError, check_extra
from ..files import parse_size, remove_folder
from ..files.destinations import output_folder
from ..interop.inspection import inspect_path
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .options import (
    demo_settings,
    is_demo,
    load_pipeline,
    parse_call_kwargs,
    parse_device,
    parse_dtype,
    parse_overrides,
    read_prompts,
)


REPORT = "calibration.json"
PLOT = "calibration.png"


def calibrate_command(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a float pipeline, or demo.", metavar="SRC")],
    destination: Annotated[pathlib.Path, typer.Argument(help="Folder to write.", metavar="DST")],
    prompts: Annotated[str, typer.Option(help="Text file, UTF-8, one prompt a line; - for stdin.", metavar="FILE")],
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
    component: Annotated[
        list[str] | None, typer.Option(help="Component of the pipeline (repeatable). Default: its denoisers.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the pipeline.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    call: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other argument of the pipeline call (repeatable).", metavar="NAME=VALUE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first prompts only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per pipeline call.", min=1)] = 1,
    passes: Annotated[int, typer.Option(help="Passes of coordinate descent over the codes.", min=0)] = 4,
    starts: Annotated[int, typer.Option(help="GPTQ solutions tried in layers of few groups a row.", min=1)] = 6,
    damping: Annotated[float, typer.Option(help="Damping of H, as a fraction of its mean diagonal.")] = 0.01,
    correct_bias: Annotated[bool, typer.Option(help="Let biases take over the mean of the error.")] = True,
    memory_limit: Annotated[
        str | None, typer.Option(help="What statistics may take, e.g. 8GB; the rest needs further passes.")
    ] = None,
    size_budget: Annotated[
        str | None,
        typer.Option(
            help="Size to keep to, spent on the layers that need it most: '2.0 bits' per weight, or e.g. 400MB of all "
            "weights of the denoisers."
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer does to the denoiser's output.")
    ] = False,
    work_dir: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where finished layers are kept for a rerun. Default: a hidden folder beside DST."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the running component on the device.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write.")] = "10GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Chooses ternary weights with the pipeline's own rollouts on a few prompts, and saves it packed.

    No images and no training; the same size as after quantize, at a fraction of its error. An interrupted run goes
    on from the layers it had finished when it is started again. DST also gets calibration.json and .png: the
    error of every layer before and after, and the sensitivity of the denoiser's output to every layer if it was
    measured. With a size budget each layer is stored as ternary codes, with smaller groups or a low-rank correction,
    as int8, or as it is.

    Example: diffusers-ternary calibrate black-forest-labs/FLUX.1-dev flux-ternary --prompts prompts.txt --steps 28
    """
    from ..calibration import CalibrationConfig, SensitivityConfig, SolverConfig, calibrate
    from .quiet import hide_loading_bars

    hide_loading_bars()
    with explained_errors(ExitCode.USAGE):
        call_kwargs = parse_call_kwargs(
            call,
            {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width},
        )
        config = TernaryConfig(
            group_size=group_size or None,
            scales=scales,
            modules_to_not_convert=skip,
            overrides=parse_overrides(override),
            components=component,
        )
        place = parse_device(device)
        torch_dtype = parse_dtype(dtype, place)
        parse_size(max_shard_size, name="--max-shard-size")
        if is_demo(source):
            call_kwargs = demo_settings(call_kwargs, steps, guidance)
        calibration = CalibrationConfig(
            solver=SolverConfig(descent_passes=passes, starts=starts, damping=damping),
            correct_bias=correct_bias,
            seed=seed,
            batch_size=batch_size,
            call_kwargs=call_kwargs,
            memory_limit=memory_limit,
            size_budget=size_budget,
            sensitivity=SensitivityConfig() if sensitivity else None,
        )
    with explained_errors():
        lines = read_prompts(prompts, limit)
        plotted = _can_plot()
        kept = work_dir or destination.parent / f".{destination.name}.calibration"
        with output_folder(destination, sources=[source], work=[work_dir], overwrite=overwrite) as folder:
            pipeline = load_pipeline(source, torch_dtype)
            if offload:
                pipeline.enable_model_cpu_offload(device=place)
            else:
                pipeline = pipeline.to(place)
            try:
                pipeline, report = calibrate(pipeline, lines, config, calibration, work_dir=kept, return_report=True)
            except (KeyboardInterrupt, SystemExit):
                console.print(
                    f"Finished layers are kept in {kept}. The same command goes on from there.", markup=False
                )
                raise
            if dtype == "auto":
                store_in_16_bits(pipeline)
            pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
            report.save_json(folder / REPORT)
            if plotted:
                report.plot(folder / PLOT)
        if work_dir is None:
            remove_folder(kept)
        components = [part for part in inspect_path(destination) if part.format_version is not None]
    for part in components:
        console.print(
            f"{escape(part.name)}: {part.packed_bits_per_weight:.3f} bits per converted weight, "
            f"{format_bytes(part.bytes)} ({part.bytes_16bit / part.bytes:.2f}x smaller than 16 bits)",
            soft_wrap=True,
        )
    console.print(report)
    errors = [(layer.error_rounded, layer.error) for layer in report.layers]
    before, after = (sum(values) / len(errors) for values in zip(*errors, strict=True))
    console.print(f"mean relative error of the layers' outputs: {before:.4f} rounded, {after:.4f} calibrated")
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)


def _can_plot() -> bool:
    """Whether there will be a plot; says so at the start if there will not."""
    try:
        check_extra("matplotlib", PLOT)
    except MissingExtraError as error:
        console.print(f"{PLOT} will be left out: {error}", soft_wrap=True, markup=False)
        return False
    return True
