# SPDX-License-Identifier: Apache-2.0
"""The command line, as people call it, in this process."""

import shlex

from typer.main import get_command
from typer.testing import CliRunner, Result

from diffusers_ternary.cli import app


def run_command(*arguments: object, stdin: str | None = None) -> Result:
    """`diffusers-ternary ARGUMENTS`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def parse_command(line: str) -> None:
    """Fails if a line of a shell is not a command that exists, with options that it has."""
    program, name, *arguments = shlex.split(line)
    assert program == "diffusers-ternary", line
    get_command(app).commands[name].make_context(name, arguments)
