# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary demo`."""

import contextlib
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..files.destinations import output_file
from .console import ExitCode, console, escape, explained_errors, format_bytes
from .quiet import quiet_hosts


# How the files of an earlier demo begin; no others are replaced.
_PICTURE, _ROWS, _DRAWINGS = b"\x89PNG", b'[\n  {\n    "variant": ', b'[\n  {\n    "prompt": '

if TYPE_CHECKING:
    from ..demo.run import DemoResult
    from ..demo.scenes import ScenesDrawing


def demo_command(
    prompts: Annotated[list[str] | None, typer.Argument(help="With --scenes: what to draw.", metavar="PROMPT")] = None,
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Draw PROMPTs, or a fixed set, with the ternary Scenes model.")
    ] = False,
    pictures: Annotated[int, typer.Option(help="With --scenes: pictures of each prompt.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="With --scenes: of the noise.", min=0)] = 0,
    full: Annotated[bool, typer.Option("--full", help="256 prompts instead of 48.")] = False,
    json_path: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Also write the table to this JSON file.", metavar="PATH")
    ] = None,
    output: Annotated[
        pathlib.Path, typer.Option(help="Folder for contact_sheet.png (scenes.png with --scenes).", metavar="DIR")
    ] = pathlib.Path("diffusers-ternary-demo"),
    threads: Annotated[int, typer.Option(help="CPU threads; the models are too small to gain from more.", min=1)] = 1,
) -> None:
    """Draws with the embedded models, teacher and ternary, and judges the pictures. Needs no network.

    Without --scenes: pixel people, by the teacher and its ternary versions. The prompts are attribute combinations
    that the teacher was never trained on; every version gets the same prompts and seeds.

    With --scenes: up to four objects in ten colors, by the ternary model alone; a detector says whether each picture
    shows what was asked for. The teacher's scores are those measured when the model was made.

    Example: diffusers-ternary demo --json demo.json

    Example: diffusers-ternary demo --scenes "a red cat left of two blue keys"
    """
    with explained_errors(ExitCode.USAGE):
        if prompts and not scenes:
            raise ValueError(f"The prompt {prompts[0]!r} is for the Scenes model. Add --scenes.")
        if full and scenes:
            raise ValueError("--full is for pixel people, --scenes for the other model. Give one of them.")
    with explained_errors(), contextlib.ExitStack() as stack:
        if json_path is not None and not json_path.parent.is_dir():
            raise FileNotFoundError(
                f"--json {json_path}: the folder {json_path.parent} does not exist. Make it first."
            )
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"--output {output} is a file. Name a folder.")
        output.mkdir(parents=True, exist_ok=True)
        sheet = output / ("scenes.png" if scenes else "contact_sheet.png")
        picture = stack.enter_context(output_file(sheet, magic=_PICTURE, overwrite=True))
        table = None
        if json_path is not None:
            magic = _DRAWINGS if scenes else _ROWS
            table = stack.enter_context(output_file(json_path, magic=magic, overwrite=True))
        result = _draw(prompts, pictures, seed, threads) if scenes else _run(full, threads)
        result.save_contact_sheet(picture)
        if table is not None:
            result.save_json(table)
    for part in _tables(result):
        console.print(part)
    for path in (sheet, json_path):
        if path is not None:
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _draw(prompts: list[str] | None, pictures: int, seed: int, threads: int) -> "ScenesDrawing":
    quiet_hosts()
    import torch

    from ..demo.scenes import SHOWN_PROMPTS, draw_scenes

    torch.set_num_threads(threads)
    return draw_scenes(prompts or SHOWN_PROMPTS, pictures=pictures if prompts else 1, seed=seed)


def _run(full: bool, threads: int) -> "DemoResult":
    quiet_hosts()
    import torch

    from ..demo.run import run_demo

    torch.set_num_threads(threads)
    return run_demo(full=full)


def _tables(result: "DemoResult | ScenesDrawing") -> list[Table]:
    from ..demo.scenes import ScenesDrawing

    return [_pictures_table(result), _figures_table(result)] if isinstance(result, ScenesDrawing) else [_table(result)]


def _pictures_table(drawing: "ScenesDrawing") -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"{len(drawing.images)} pictures in {drawing.seconds:.1f} seconds, drawn by ternary weights.",
        caption_justify="left",
    )
    for heading in ("prompt", "seed", "judge"):
        table.add_column(heading, justify="right" if heading == "seed" else "left")
    for prompt, seed, judgement in zip(drawing.prompts, drawing.seeds, drawing.judgements, strict=True):
        said = "[yellow]cannot score it[/]" if judgement is None else "[green]right[/]"
        if judgement is not None and not judgement.score:
            said = f"[red]wrong[/]: {escape(judgement.reason or '')}"
        table.add_row(escape(prompt), str(seed), said)
    return table


def _figures_table(drawing: "ScenesDrawing") -> Table:
    figures = drawing.figures
    table = Table(
        title="on the benchmark",
        box=box.SIMPLE_HEAD,
        caption=f"Share of right pictures, {figures['pictures']} held-out prompts, {figures['seeds']} seeds: "
        f"measured when the model was made ({figures['row']}, {figures['bits_per_weight']:.2f} bits per weight).",
        caption_justify="left",
    )
    for heading in ("task", "ternary", "teacher"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, value in figures["ternary"].items():
        table.add_row(task.replace("_", " "), f"{value:.1%}", f"{figures['teacher'][task]:.1%}")
    return table


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
