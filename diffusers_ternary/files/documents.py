# SPDX-License-Identifier: Apache-2.0
"""JSON documents, read as something that anybody may have written."""

import json
import math
import os
import pathlib
from typing import Any

from .atomic import write_text
from .names import PathLike


RESTORE = "Restore the file."


def parse_json(text: str | bytes, *, source: PathLike, remedy: str = RESTORE) -> Any:
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


def parse_json_object(text: str | bytes, *, source: PathLike, remedy: str = RESTORE) -> dict[str, Any]:
    """A JSON object; arguments and errors as of [`parse_json`]."""
    content = parse_json(text, source=source, remedy=remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(source)} does not hold a JSON object. {remedy}")
    return content


def read_json(path: PathLike, *, remedy: str = RESTORE) -> dict[str, Any] | None:
    """The JSON object in a file, or `None` if there is no such file.

    Raises:
        ValueError: if the file holds something else.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        return None
    return parse_json_object(file.read_bytes(), source=file, remedy=remedy)


def finite(value: Any) -> Any:
    """JSON values that every reader knows: numbers that are not finite become `None`, inside dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: PathLike, content: Any, *, allow_nan: bool = True) -> None:
    """Writes JSON, so that the file is the old one or the new one, never a part.

    Args:
        path (`str` or `os.PathLike`): the file.
        content: JSON values.
        allow_nan (`bool`, *optional*, defaults to `True`): write numbers that are not finite, which few readers know.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")
