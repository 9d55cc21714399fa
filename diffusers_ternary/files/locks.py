# SPDX-License-Identifier: Apache-2.0
"""Locks between runs that write to the same place."""

import contextlib
import errno
import logging
import os
import pathlib
from collections.abc import Iterator

import filelock

from .disk_errors import DISK_ERRORS, unwritable
from .names import PathLike


logger = logging.getLogger(__name__)
LOCK = ".lock"


@contextlib.contextmanager
def lock(path: PathLike, what: str) -> Iterator[bool]:
    """Keeps other processes, and other calls in this one, from writing to a file or folder meanwhile.

    The lock ends with the process, however that ends.

    Args:
        path (`str` or `os.PathLike`): the file or folder; the lock lies beside it.
        what (`str`): who would hold it, for the message: "another calibration".

    Returns:
        Whether it is held; where a file system knows no locks, nobody is kept out.

    Raises:
        BlockingIOError: if it is held.
        OSError: if nothing can be written there.
    """
    target = pathlib.Path(path).resolve()
    made = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    file = target.with_name(f".{target.name}{LOCK}")
    holder = filelock.FileLock(file, blocking=False, thread_local=False)
    held = True
    try:
        holder.acquire()
    except filelock.Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN, f"{target} is in use by {what}. Wait until that has ended, or choose another place"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, *DISK_ERRORS}:
            raise unwritable(target, error) from error
        held = False
        logger.warning("%s cannot be locked (%s). Let no other run write there.", target, error)
    try:
        yield held
    finally:
        if held:
            if os.name == "posix":  # while it is held, so that nobody holds a lock without a name
                file.unlink(missing_ok=True)
            holder.release()
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()  # if nothing was written there
