# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary convert`."""

import json
import pathlib
from typing import Annotated

import typer

from .console import console, escape, explained_errors, format_bytes


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Ternary model of others (folder, Hub id, .gguf, Clark .safetensors), or a packed folder to export.",
            metavar="SRC",
        ),
    ],
    destination: Annotated[pathlib.Path, typer.Argument(help="Folder to write, or FILE.gguf.", metavar="DST")],
    component: Annotated[
        list[str] | None, typer.Option(help="Component of the pipeline (repeatable). Default: its denoisers.")
    ] = None,
    config: Annotated[
        pathlib.Path | None, typer.Option(help="config.json of the model, for files without one.", metavar="PATH")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the source's files, e.g. fp16.")] = None,
    verify: Annotated[bool, typer.Option(help="Read the result again and compare every weight.")] = True,
    runtime: Annotated[
        str,
        typer.Option("--for", help="To GGUF: the program that reads it: sdcpp-cpu, sdcpp-gpu, comfyui or diffusers."),
    ] = "sdcpp-cpu",
    ternary_type: Annotated[
        str | None, typer.Option("--type", help="To GGUF: tq2_0, tq1_0, q2_0 or q4_0. Default: the program's best.")
    ] = None,
    round_scales: Annotated[
        bool, typer.Option(help="To GGUF: round scales to float16 (at most 0.05 %), or refuse layers that need it.")
    ] = True,
    fallback: Annotated[
        str | None, typer.Option(help="To GGUF: f32, f16 or q8_0 for layers that no type holds exactly.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Packs a ternary model that somebody else published, or exports a packed one to GGUF. Nothing is rounded.

    Reads "unpacked" checkpoints, Clark packs of Sana, 2-bit state dicts of gemlite and HQQ, and GGUF files. Finds the
    group size of every layer and keeps, and reports, what is not ternary.

    Example: diffusers-ternary convert someone/unpacked-ternary-model packed

    Example: diffusers-ternary convert my-flux-ternary flux.gguf
    """
    from .quiet import hide_loading_bars

    hide_loading_bars()
    if destination.suffix == ".gguf":
        _export(source, destination, runtime, ternary_type, round_scales, fallback, as_json, overwrite)
        return
    from ..interop import convert

    with explained_errors():
        reports = convert(
            source,
            destination,
            components=component,
            config=config,
            variant=variant,
            verify=verify,
            overwrite=overwrite,
        )
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
        return
    for report in reports:
        console.print(escape(report.summary()), soft_wrap=True)
        ratio = report.source_bytes / report.bytes
        console.print(f"{format_bytes(report.source_bytes)} → {format_bytes(report.bytes)} ({ratio:.2f}x smaller)")
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)


def _export(
    source: str,
    destination: pathlib.Path,
    runtime: str,
    ternary_type: str | None,
    round_scales: bool,
    fallback: str | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    from ..interop import export_gguf

    with explained_errors():
        report = export_gguf(
            source,
            destination,
            runtime=runtime,
            ternary_type=ternary_type,
            round_scales=round_scales,
            fallback=fallback,
            overwrite=overwrite,
        )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.types.items()))
    console.print(f"{report.architecture}: {kinds} tensors; {format_bytes(report.bytes)}", soft_wrap=True)
    console.print(f"Read again and compared: {report.proof()}.", soft_wrap=True)
    console.print(f"saved to {escape(str(destination))}", soft_wrap=True)
