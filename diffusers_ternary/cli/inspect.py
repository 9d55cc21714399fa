# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary inspect`."""

import itertools
import json
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .console import console, escape, explained_errors, format_bytes
from .options import AsJson


if TYPE_CHECKING:
    from ..interop.inspection import Component, Row


def inspect_command(
    path: Annotated[pathlib.Path, typer.Argument(help="Pipeline folder, model folder, safetensors or GGUF file.")],
    runtimes: Annotated[
        bool, typer.Option("--runtimes", help="Size and expected memory of a packed denoiser in each program.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Shows what a folder or file of weights holds: layers, shapes, bits per weight, bytes.

    Also in the formats of others that `convert` reads. Reads headers only, so a file of gigabytes takes a second.

    Example: diffusers-ternary inspect out/transformer

    Example: diffusers-ternary inspect out --runtimes
    """
    if runtimes:
        _show_runtimes(path, as_json)
        return
    with explained_errors():
        from ..interop.contents import UNPACKED
        from ..interop.inspection import inspect_path

        components = inspect_path(path)
    if as_json:
        print(json.dumps([component.to_dict() for component in components], indent=2))
        return
    for component in components:
        console.print(_table(component))
        if component.format == UNPACKED:
            hint = "holds ternary values: `diffusers-ternary convert` packs it without loss"
            console.print(f"{escape(component.name)} {hint}", soft_wrap=True)
    if len(components) > 1:
        console.print(_ratio("total", sum(c.bytes for c in components), sum(c.bytes_16bit for c in components)))


def _show_runtimes(path: pathlib.Path, as_json: bool) -> None:
    from ..interop.runtimes import runtime_sizes

    with explained_errors():
        sizes = runtime_sizes(path)
    if as_json:
        print(json.dumps([size.to_dict() for size in sizes], indent=2))
        return
    table = Table(box=SIMPLE_HEAD, caption="activations, text encoders and autoencoder not counted")
    table.add_column("program")
    for heading in ("file", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sizes:
        figures = ("-", "-") if size.reason else (format_bytes(size.bytes), format_bytes(size.memory))
        table.add_row(size.runtime, *figures)
    console.print(table)
    for reason in dict.fromkeys(size.reason for size in sizes if size.reason):
        names = ", ".join(size.runtime for size in sizes if size.reason == reason)
        console.print(f"{names}: {escape(reason)}", soft_wrap=True)


def _table(component: "Component") -> Table:
    from ..interop.contents import UNPACKED

    title = component.name
    if component.format_version is not None:
        title += f"  (packed, format version {component.format_version})"
    elif component.format not in (None, UNPACKED):
        title += f"  ({component.format})"
    bits = component.packed_bits_per_weight
    caption = _ratio("size", component.bytes, component.bytes_16bit)
    if bits is not None:
        caption = f"{bits:.3f} bits per converted weight; {caption}"
    table = Table(
        title=escape(title),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # names of layers are long, and terminals are 80 columns wide
    )
    table.add_column("layers", overflow="fold")
    for heading in ("count", "shape", "bits", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, group in itertools.groupby(sorted(component.rows, key=_kind_order), key=lambda row: row.kind):
        rows = list(group)
        kept = rows[0].shape is None
        if len(rows) > 1 or kept:
            weights, size = sum(row.weights for row in rows), sum(row.bytes for row in rows)
            label = f"kept in {kind} (tensors)" if kept else kind
            count = sum(row.count for row in rows)
            table.add_row(f"[bold]{label}", f"{count}", "", f"{8 * size / max(weights, 1):.3f}", format_bytes(size))
        for row in rows if not kept else ():
            shape = "" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}"
            name = f"  {row.name}" if len(rows) > 1 else f"{row.name} [bold]{kind}"
            table.add_row(name, f"{row.count}", shape, f"{row.bits_per_weight:.3f}", format_bytes(row.bytes))
    return table


def _kind_order(row: "Row") -> tuple[bool, str]:
    return row.shape is None, row.kind


def _ratio(label: str, size: int, size_16bit: int) -> str:
    ratio = size_16bit / size if size else 1.0
    return f"{label} {format_bytes(size)}, {ratio:.2f}x smaller than 16 bits ({format_bytes(size_16bit)})"
