# SPDX-License-Identifier: Apache-2.0
"""What the commands share: output, messages for people, exit codes."""

import contextlib
import enum
import logging
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from ..extras import MissingExtraError


class ExitCode(enum.IntEnum):
    """Exit codes of every command (2 is the shell's own code for wrong usage)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    INTERRUPTED = 130
    TERMINATED = 143


# As rich finds tags.
_BRACKET = re.compile(r"(\\*)\[([a-z#/@][^\[]*?\])?")
console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def explained_errors(code: ExitCode = ExitCode.BAD_INPUT) -> Iterator[None]:
    """Turns errors that name their remedy into one message and an exit code; bugs keep their traceback.

    Where options alone are looked at, the code is `USAGE`: they are wrong whatever the input.

    A request to end (SIGTERM, SIGHUP) unwinds like an error, so that nothing half-written stays behind.
    """
    try:
        with _ends_cleanly():
            yield
    except (ValueError, TypeError, OSError, MissingExtraError, SafetensorError, MemoryError) as error:
        if isinstance(error, MemoryError) and not str(error):
            raise
        errors.print(f"[bold red]error:[/] {escape(_message(error))}", soft_wrap=True)
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        raise typer.Exit(code) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from error


@contextlib.contextmanager
def _ends_cleanly() -> Iterator[None]:
    """Makes the signals that ask a process to end raise `SystemExit`, until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    # Whoever started the process may have said otherwise: nohup ignores SIGHUP.
    ours = [number for number in numbers if before[number] == signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # asking twice does not stop the cleaning up
        errors.print("terminated")
        raise SystemExit(128 + number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _message(error: BaseException) -> str:
    """Without the number of an operating system's error, where the sentence says it all."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error)


def escape(text: str) -> str:
    r"""Text as it is, for rich's markup: square brackets of a message are shapes, and backslashes are of paths.

    rich's own function loses the backslash of `a\[b`.
    """
    # Where what follows could be a tag, backslashes count in pairs.
    return _BRACKET.sub(lambda found: f"{found[1] * (2 if found[2] else 1)}\\[{found[2] or ''}", text)


def format_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count: 1.21 GB, 374.0 MB."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 2)):
        if count < 1000 or unit == "GB":
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
