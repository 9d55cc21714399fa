# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary push`."""

import pathlib
from typing import Annotated

import typer

from ..files import temporary_folder
from .console import console, escape, explained_errors, format_bytes
from .quiet import quiet_hosts


def push_command(
    folder: Annotated[
        pathlib.Path, typer.Argument(help="Folder that quantize, calibrate or save_pretrained wrote.", metavar="DIR")
    ],
    repo_id: Annotated[
        str, typer.Argument(help="NAMESPACE/NAME on the Hub; made if it does not exist.", metavar="REPO")
    ],
    base_model: Annotated[str, typer.Option(help="Hub id of the float model; its card gives license and tag.")],
    report: Annotated[
        pathlib.Path | None,
        typer.Option(help="What evaluate --report wrote: its folder or JSON file.", metavar="PATH"),
    ] = None,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(help="Default: calibration.json of DIR.", metavar="FILE")
    ] = None,
    distillation: Annotated[
        pathlib.Path | None, typer.Option(help="Default: distill.json of DIR.", metavar="FILE")
    ] = None,
    include_dequantized: Annotated[
        bool, typer.Option("--include-dequantized", help="Add a bfloat16 copy that loads without this package.")
    ] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: as the Hub decides.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it does not exist, or refs/pr/N.", metavar="NAME")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and send nothing.")] = False,
) -> None:
    """Publishes packed weights on the Hugging Face Hub, with a model card that says what was measured.

    Everything is checked first and arrives in one commit. The same command again continues an interrupted push.

    If DIR has a README.md of your own, its text is kept. Log in with `hf auth login`, or set HF_TOKEN.

    Example: diffusers-ternary push flux-ternary me/flux-ternary --base-model black-forest-labs/FLUX.1-dev --dry-run
    """
    quiet_hosts()
    from ..hub import WORK, check_target, prepare, read_base_card, upload

    with explained_errors(), temporary_folder(WORK) as work:
        check_target(repo_id, revision=revision, create_pr=create_pr)
        publication = prepare(
            folder,
            repo_id,
            read_base_card(base_model),
            work,
            report=report,
            calibration=calibration,
            distillation=distillation,
            include_dequantized=include_dequantized,
        )
        if dry_run:
            for path, file in sorted(publication.files.items()):
                console.print(f"{format_bytes(file.stat().st_size):>10}  {escape(path)}", soft_wrap=True)
            console.print()
            print(publication.card)
        size = f"{len(publication.files)} files, {format_bytes(publication.bytes)}"
        bits = f"{publication.source.bits_per_weight:.3f} bits per converted weight"
        console.print(f"{size}; {bits}", soft_wrap=True, highlight=False)
        if dry_run:
            console.print(f"nothing was sent to {repo_id}", soft_wrap=True, highlight=False)
            return
        commit = upload(
            publication.files,
            repo_id,
            message=publication.message,
            private=private,
            revision=revision,
            create_pr=create_pr,
        )
    console.print(f"pushed to {commit.pr_url or commit.commit_url}", soft_wrap=True, highlight=False, markup=False)
