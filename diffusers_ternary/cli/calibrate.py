# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary calibrate`."""

from typing import Annotated, Any

import typer

from ..extras import MissingExtraError, check_extra
from ..files import parse_size, remove_folder
from ..files.destinations import output_folder
from . import options
from .call import show_plan
from .console import ExitCode, console, explained_errors
from .fields import with_options
from .quiet import quiet_hosts


REPORT = "calibration.json"
PLOT = "calibration.png"
WEIGHTS = options.weight_options("rounding")  # the solver has its own
CALIBRATION = options.CalibrationOptions()


@with_options(options.CALL, WEIGHTS, CALIBRATION)
def calibrate_command(
    source: options.Source,
    destination: options.Destination,
    prompts: options.Prompts,
    limit: options.Limit = None,
    lora: options.Adapters = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer does to the denoiser's output.")
    ] = False,
    work_dir: options.WorkDir = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    offload: options.Offload = False,
    max_shard_size: options.MaxShardSize = "10GB",
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    **values: Any,
) -> None:
    """Chooses ternary weights with the pipeline's own rollouts on a few prompts, and saves it packed.

    No images and no training; the same size as after quantize, at a fraction of its error. An interrupted run goes
    on from the layers it had finished when it is started again. DST also gets calibration.json and .png: the
    error of every layer before and after, and the sensitivity of the denoiser's output to every layer if it was
    measured. With a size budget each layer is stored as ternary codes, with smaller groups or a low-rank correction,
    as int8, or as it is.

    Example: diffusers-ternary calibrate black-forest-labs/FLUX.1-dev flux-ternary --prompts prompts.txt --steps 28
    """
    quiet_hosts()
    with explained_errors(ExitCode.USAGE):
        config = options.ternary_config(WEIGHTS, values)
        place = options.parse_device(device)
        torch_dtype = options.parse_dtype(dtype, place)
        adapters = options.parse_adapters(lora)
        parse_size(max_shard_size, name="--max-shard-size")
        calibration = CALIBRATION.config(values, options.CALL.given(values, source), sensitivity=sensitivity)
    with explained_errors():
        from ..calibration import calibrate

        lines = options.read_prompts(prompts, limit)
        plotted = _can_plot()
        kept = work_dir or destination.parent / f".{destination.name}.calibration"
        with output_folder(destination, sources=[source, *adapters], work=[work_dir], overwrite=overwrite) as folder:
            pipeline = options.load_pipeline(source, torch_dtype)
            folded = options.fold_adapters(pipeline, adapters)
            show_plan(
                pipeline,
                lines,
                calibration.call_kwargs,
                *folded,
                f"finished layers are kept in {kept}",
                device=place,
                batch_size=calibration.batch_size,
                predict=lambda forecast: forecast.calibrating(config, calibration),
            )
            if dry_run:
                raise typer.Exit
            pipeline = options.place_pipeline(pipeline, place, offload=offload)
            try:
                pipeline, report = calibrate(pipeline, lines, config, calibration, work_dir=kept, return_report=True)
            except (KeyboardInterrupt, SystemExit):
                console.print(
                    f"Finished layers are kept in {kept}. The same command goes on from there.", markup=False
                )
                raise
            options.save_pipeline(pipeline, folder, dtype=dtype, max_shard_size=max_shard_size)
            report.save_json(folder / REPORT)
            if plotted:
                report.plot(folder / PLOT)
        if work_dir is None:
            remove_folder(kept)
        console.print(report)
        errors = [(layer.error_rounded, layer.error) for layer in report.layers]
        before, after = (sum(each) / len(errors) for each in zip(*errors, strict=True))
        console.print(f"mean relative error of the layers' outputs: {before:.4f} rounded, {after:.4f} calibrated")
        options.show_saved(destination)


def _can_plot() -> bool:
    """Whether there will be a plot; says so at the start if there will not."""
    try:
        check_extra("matplotlib", PLOT)
    except MissingExtraError as error:
        console.print(f"{PLOT} will be left out: {error}", soft_wrap=True, markup=False)
        return False
    return True
