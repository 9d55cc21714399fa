# SPDX-License-Identifier: Apache-2.0
"""The command line, as people call it, in this process."""

from typer.testing import CliRunner, Result

from diffusers_ternary.cli import app


def run_command(*arguments: object, stdin: str | None = None) -> Result:
    """`diffusers-ternary ARGUMENTS`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
