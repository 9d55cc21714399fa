# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary convert`."""

import json
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .quiet import quiet_hosts


if TYPE_CHECKING:
    from ..interop import ExportReport


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Ternary model of others (folder, Hub id, .gguf, Clark .safetensors), or a packed folder to export.",
            metavar="SRC",
        ),
    ],
    destination: Annotated[pathlib.Path, typer.Argument(help="Folder to write, or FILE.gguf.", metavar="DST")],
    component: options.Component = None,
    config: Annotated[
        pathlib.Path | None, typer.Option(help="config.json of the model, for files without one.", metavar="PATH")
    ] = None,
    variant: options.Variant = None,
    verify: Annotated[bool, typer.Option(help="Read the result again and compare every weight.")] = True,
    to: Annotated[
        str | None,
        typer.Option(help="packed, gguf or mflux. Default: gguf if DST ends in .gguf, else packed.", metavar="FORMAT"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option("--for", help="To GGUF: the program that reads it: sdcpp-cpu, sdcpp-gpu, comfyui or diffusers."),
    ] = None,
    ternary_type: Annotated[
        str | None,
        typer.Option(
            "--type", "--ternary-type", help="To GGUF: tq2_0, tq1_0, q2_0 or q4_0. Default: the program's best."
        ),
    ] = None,
    round_scales: Annotated[
        bool | None,
        typer.Option(
            "--round-scales/--no-round-scales",
            help="To GGUF: round scales to float16 (at most 0.05 %; default), or refuse layers that need it.",
        ),
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="To GGUF: f32, f16 or q8_0 for layers that no type holds exactly.")
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="To GGUF and mflux: store layers that they cannot hold (rotated, low rank) in 16 bits."
        ),
    ] = False,
    as_json: options.AsJson = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Packs a ternary model that somebody else published, or exports a packed one to GGUF or mflux.

    Reads "unpacked" checkpoints, Clark packs of Sana, 2-bit state dicts of gemlite and HQQ, and GGUF files. Finds the
    group size of every layer and keeps, and reports, what is not ternary.

    Example: diffusers-ternary convert someone/unpacked-ternary-model packed

    Exports are read again and every weight is compared.

    Example: diffusers-ternary convert my-flux-ternary flux.gguf --for sdcpp-gpu

    Example: diffusers-ternary convert my-flux-ternary flux-mlx --to mflux
    """
    quiet_hosts()
    target = to or ("gguf" if destination.suffix == ".gguf" else "packed")
    export_options: dict[str, Any] = {
        "runtime": runtime,
        "ternary_type": ternary_type,
        "round_scales": round_scales,
        "fallback": fallback,
        "merge": merge or None,
    }
    given = {name: value for name, value in export_options.items() if value is not None}
    from ..interop.convert import check_options, convert

    with explained_errors(ExitCode.USAGE):
        check_options(target, components=component, config=config, variant=variant, **given)
    with explained_errors():
        reports = convert(
            source,
            destination,
            components=component,
            config=config,
            variant=variant,
            verify=verify,
            overwrite=overwrite,
            to=target,
            **given,
        )
    if not isinstance(reports, list):
        _show_export(reports, destination, as_json)
        return
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
        return
    for report in reports:
        console.print(escape(report.summary()), soft_wrap=True)
        ratio = report.source_bytes / report.bytes
        console.print(f"{format_bytes(report.source_bytes)} → {format_bytes(report.bytes)} ({ratio:.2f}x smaller)")
    options.show_path(destination)


def _show_export(report: "ExportReport", destination: pathlib.Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.types.items()))
    console.print(f"{report.architecture}: {kinds} tensors; {format_bytes(report.bytes)}", soft_wrap=True)
    console.print(f"Read again and compared: {report.proof()}.", soft_wrap=True)
    options.show_path(destination)
