# SPDX-License-Identifier: Apache-2.0
"""Errors of the disk: they say what could not be written, why, and what to do."""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

from safetensors import SafetensorError

from .names import PathLike, is_leftover


DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def explained_disk_errors(target: PathLike) -> Iterator[None]:
    """Says of a full disk, a quota or a read-only disk what could not be written, whichever library ran into it.

    Raises:
        OSError: with the same `errno`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno_of(error)
        if number not in DISK_ERRORS:
            raise
        place = getattr(error, "place", None) or getattr(error, "filename", None) or os.fspath(target)
        hidden = any(is_leftover(pathlib.Path(part)) for part in pathlib.Path(place).parts)
        where = "" if hidden or pathlib.Path(place) == pathlib.Path(target) else f" at {place}"
        explained = OSError(
            number,
            f"{os.fspath(target)} cannot be written: {os.strerror(number)}{where}. Nothing incomplete was left "
            "behind. Free space or choose another place, and run again.",
        )
        explained.place = place  # type: ignore[attr-defined]
        raise explained from error


def unwritable(target: pathlib.Path, error: OSError) -> OSError:
    """The error of a place where nothing can be written, of the same class and with the same `errno`."""
    reason = os.strerror(error.errno or errno.EIO)
    return type(error)(error.errno, f"{target} cannot be written: {reason}. Choose another place")


def _errno_of(error: Exception) -> int:
    """The number of an operating system's error, also where a library hides it in its message; 0 if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    if found:
        return int(found[1])
    short = re.fullmatch(r"\d+ requested and \d+ written", str(error))  # numpy
    return errno.ENOSPC if short else 0
