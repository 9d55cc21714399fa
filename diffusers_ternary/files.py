# SPDX-License-Identifier: Apache-2.0
"""Reads files that somebody else wrote: whatever is in them, an error names the file and the remedy."""

import json
import os
import pathlib
from typing import Any


RESTORE = "Restore the file."


def parse_json(text: str | bytes, *, source: str | os.PathLike[str], remedy: str = RESTORE) -> Any:
    """A JSON value.

    Args:
        text (`str` or `bytes`): UTF-8.
        source (`str` or `PathLike`): where it is from, for messages.
        remedy (`str`, *optional*): what to do about a damaged one.

    Raises:
        ValueError: if it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, and numbers of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{os.fspath(source)} is not valid JSON ({reason}). {remedy}") from error


def parse_json_object(text: str | bytes, *, source: str | os.PathLike[str], remedy: str = RESTORE) -> dict[str, Any]:
    """A JSON object; arguments and errors as of [`parse_json`]."""
    content = parse_json(text, source=source, remedy=remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(source)} does not hold a JSON object. {remedy}")
    return content


def read_json(path: str | os.PathLike[str], *, remedy: str = RESTORE) -> dict[str, Any] | None:
    """The JSON object in a file, or `None` if there is no such file.

    Raises:
        ValueError: if the file holds something else.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        return None
    return parse_json_object(file.read_bytes(), source=file, remedy=remedy)
