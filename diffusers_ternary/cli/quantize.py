# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary quantize`."""

import pathlib
from typing import Annotated

import torch
import typer

from ..backend.config import COMPUTE_DTYPES, TernaryConfig
from ..backend.sources import load_quantized
from ..files import parse_size
from ..files.destinations import output_folder
from ..interop.inspection import inspect_path
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .options import is_demo, parse_overrides


def quantize_command(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a float pipeline or model, or demo.", metavar="SRC")
    ],
    destination: Annotated[pathlib.Path, typer.Argument(help="Folder to write.", metavar="DST")],
    group_size: Annotated[
        int, typer.Option(help="Input columns that share a scale; 0 = one scale per row.", min=0)
    ] = 128,
    rounding: Annotated[str, typer.Option(help="twn, optimum, absmean, or recover (never round).")] = "twn",
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
    dtype: Annotated[str, typer.Option(help="Dtype of what is not converted.")] = "bfloat16",
    variant: Annotated[str | None, typer.Option(help="Variant of the source's files, e.g. fp16.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write.")] = "10GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Rounds a float pipeline or model to ternary weights and saves it packed.

    Reads and packs layer by layer: memory never holds more than one file of the source and the packed model. DST
    appears only when it is complete.

    Example: diffusers-ternary quantize black-forest-labs/FLUX.1-dev flux-ternary --override "*.norm1*.linear=int8"

    Rounding alone spoils the pictures of most models; it is the starting point of calibration and distillation.
    """
    from .quiet import hide_loading_bars

    hide_loading_bars()
    with explained_errors(ExitCode.USAGE):
        config = TernaryConfig(
            group_size=group_size or None,
            rounding=rounding,
            scales=scales,
            modules_to_not_convert=skip,
            overrides=parse_overrides(override),
            components=component,
        )
        model_dtype = _parse_dtype(dtype)
        parse_size(max_shard_size, name="--max-shard-size")
    with explained_errors():
        place = _resolve(source)
        with output_folder(destination, sources=[place], overwrite=overwrite) as folder:
            model = load_quantized(place, config, dtype=model_dtype, variant=variant)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        components = [part for part in inspect_path(destination) if part.format_version is not None]
    for part in components:
        console.print(
            f"{escape(part.name)}: {part.packed_bits_per_weight:.3f} bits per converted weight, "
            f"{format_bytes(part.bytes)} ({part.bytes_16bit / part.bytes:.2f}x smaller than 16 bits)",
            soft_wrap=True,
        )
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)


def _resolve(source: str) -> str:
    if not is_demo(source):
        return source
    from ..demo.pipeline import demo_folder

    return demo_folder(source.partition(":")[2] or "teacher")


def _parse_dtype(name: str) -> torch.dtype:
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"--dtype {name!r} is not one of {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]
