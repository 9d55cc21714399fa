# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary plan`."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import options
from .call import known_call
from .console import console, escape, explained_errors, format_bytes
from .quiet import quiet_hosts


if TYPE_CHECKING:
    from ..planning import PipelinePlan

_SIDE = 1024  # pixels


def plan_command(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a float pipeline, or demo.", metavar="MODEL")],
    vram: Annotated[
        str | None,
        typer.Option(
            help="Memory of the GPU to draw on, e.g. 6GB: the best quality that fits is proposed. Default: ternary "
            "denoisers, large text encoders in int8.",
            metavar="SIZE",
        ),
    ] = None,
    pixels: Annotated[
        int | None,
        typer.Option(
            help="Pixels of a side that are drawn. Default: what the model was calibrated at, if its folder says it, "
            "else 1024.",
            min=1,
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip that is drawn.", min=1)] = 1,
    as_json: options.AsJson = False,
) -> None:
    """Predicts what a pipeline takes as ternary: files, memory while drawing, calibrating and distilling.

    From headers and configs alone: nothing is loaded, and of a Hub id only these are downloaded. Proposes for every
    component what it should become, and prints the config and the commands for it.

    Example: diffusers-ternary plan black-forest-labs/FLUX.1-dev --vram 6GB
    """
    quiet_hosts()
    with explained_errors():
        from ..planning import plan

        place = options.place_of(source)
        found = plan(place, vram=vram, pixels=pixels or _known_side(place), frames=frames)
    if place != source:  # the embedded model has a name, and its folder is nobody's business
        found = dataclasses.replace(found, source=source)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    _show(found)


def _known_side(place: str) -> int:
    call = known_call(place)
    return math.isqrt(int(call.get("height", _SIDE)) * int(call.get("width", _SIDE)))


def _show(found: "PipelinePlan") -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="predictions", caption_justify="left")
    table.add_column("component", overflow="fold")
    table.add_column("becomes")
    for heading in ("files now", "files then", "memory", "while it works"):
        table.add_column(heading, justify="right")
    for part in found.components:
        figures = (part.source, part.file, part.memory, part.working)
        table.add_row(escape(part.name), part.kind, *map(format_bytes, figures))
    console.print(table)
    how = "one component on the GPU at a time" if found.offload else "all components on the GPU"
    lines = [f"drawing: {format_bytes(found.drawing)}, {how}"]
    lines.append(f"quantizing: {format_bytes(max(part.quantizing for part in found.components))} of main memory")
    for part in found.denoisers:
        lines.append(f"calibrating {part.name}: {format_bytes(part.calibrating or 0)}")
        modes = ", ".join(f"{mode} {format_bytes(size)}" for mode, size in part.distilling.items())
        lines.append(f"distilling {part.name}, one row at a time: {modes}")
    by_kind = {part.kind: part for part in found.components}
    lines += [f"quality of {kind}: {part.quality} ({part.origin})" for kind, part in by_kind.items()]
    lines += ["", *found.code.splitlines(), "", *found.commands]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
