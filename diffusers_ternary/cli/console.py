# SPDX-License-Identifier: Apache-2.0
"""What the commands share: output, messages for people, exit codes."""

import contextlib
import enum
import logging
from collections.abc import Iterator

import typer
from rich.console import Console


class ExitCode(enum.IntEnum):
    """Exit codes of every command (2 is the shell's own code for wrong usage)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    INTERRUPTED = 130


console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Turns errors that name their remedy into one message and exit code 3; bugs keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, OSError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        raise typer.Exit(ExitCode.BAD_INPUT) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from error


def escape(text: str) -> str:
    """Square brackets of a message are shapes, not rich markup."""
    return text.replace("[", r"\[")


def format_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count: 1.21 GB, 374.0 MB."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 2)):
        if count < 1000 or unit == "GB":
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
