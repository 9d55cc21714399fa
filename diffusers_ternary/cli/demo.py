# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary demo`."""

import contextlib
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..files.destinations import output_file
from .console import console, explained_errors, format_bytes
from .quiet import quiet_hosts


# How the files of an earlier demo begin; no others are replaced.
_PICTURE, _ROWS = b"\x89PNG", b'[\n  {\n    "variant": '

if TYPE_CHECKING:
    from ..demo.run import DemoResult


def demo_command(
    full: Annotated[bool, typer.Option("--full", help="256 held-out prompts instead of 48.")] = False,
    json_path: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Also write the table to this JSON file.", metavar="PATH")
    ] = None,
    output: Annotated[pathlib.Path, typer.Option(help="Folder for contact_sheet.png.", metavar="DIR")] = pathlib.Path(
        "diffusers-ternary-demo"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads; the model is too small to gain from more.", min=1)] = 1,
) -> None:
    """Draws pixel people with the embedded model and its ternary versions, and judges both. Needs no network.

    The prompts are attribute combinations that the embedded model was never trained on; every version gets the same
    prompts and seeds.

    Example: diffusers-ternary demo --json demo.json
    """
    with explained_errors(), contextlib.ExitStack() as stack:
        if json_path is not None and not json_path.parent.is_dir():
            raise FileNotFoundError(
                f"--json {json_path}: the folder {json_path.parent} does not exist. Make it first."
            )
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"--output {output} is a file. Name a folder.")
        output.mkdir(parents=True, exist_ok=True)
        sheet = output / "contact_sheet.png"
        picture = stack.enter_context(output_file(sheet, magic=_PICTURE, overwrite=True))
        table = None
        if json_path is not None:
            table = stack.enter_context(output_file(json_path, magic=_ROWS, overwrite=True))
        result = _run(full, threads)
        result.save_contact_sheet(picture)
        if table is not None:
            result.save_json(table)
    console.print(_table(result))
    for path in (sheet, json_path):
        if path is not None:
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _run(full: bool, threads: int) -> "DemoResult":
    quiet_hosts()
    import torch

    from ..demo.run import run_demo

    torch.set_num_threads(threads)
    return run_demo(full=full)


def _table(result: "DemoResult") -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"{len(result.prompts)} held-out prompts, one seed each, the same for all variants. "
        "PSNR and velocity error: distance to the teacher. Seconds: wall time of one run, other load included.",
        caption_justify="left",
    )
    table.add_column("variant")
    headings = ("bits per\nweight", "size", "attrib.\nright", "all\nright", "PSNR\ndB", "velocity\nNMSE", "sec.")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result.rows:
        values = row.to_dict()
        table.add_row(
            row.variant,
            f"{row.bits_per_weight:.2f}",
            format_bytes(row.bytes),
            f"{row.attribute_accuracy:.1%}",
            f"{row.all_attributes:.1%}",
            "–" if values["psnr_db"] is None else f"{row.psnr_db:.1f}",
            "–" if values["velocity_nmse"] is None else f"{row.velocity_nmse:.3f}",
            f"{row.seconds:.1f}",
        )
    return table
