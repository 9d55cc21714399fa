# SPDX-License-Identifier: Apache-2.0
"""The commands and the options that all of them have."""

import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from typing import Annotated

import typer

from .calibrate import calibrate_command
from .console import console
from .convert import convert_command
from .demo import demo_command
from .distill import distill_command
from .evaluate import evaluate_command
from .inspect import inspect_command
from .plan import plan_command
from .push import push_command
from .quantize import quantize_command


app = typer.Typer(
    name="diffusers-ternary",
    help="Ternary (1.58-bit) diffusion models: plan, quantize, calibrate, distill, inspect, compare, publish. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad input (the message says what to do).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "plan": plan_command,
    "quantize": quantize_command,
    "calibrate": calibrate_command,
    "distill": distill_command,
    "convert": convert_command,
    "inspect": inspect_command,
    "evaluate": evaluate_command,
    "push": push_command,
}
for name, command in COMMANDS.items():
    # The terminal wraps the lines, not the source.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, help="\n\n".join(" ".join(each.split()) for each in paragraphs))(command)


def _print_version(value: bool) -> None:
    if value:
        console.print(importlib.metadata.version("diffusers-ternary"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is converted, kept and why.")] = False,
) -> None:
    """Sets up logging for all commands."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("diffusers_ternary").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Entry point of the console script."""
    app()
