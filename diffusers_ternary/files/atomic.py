# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are complete or absent.

A result is written beside its place, under a hidden name that ends in `.partial`, and takes its place when it is
complete and on the disk. What a killed run leaves behind is removed by the next one.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from .disk_errors import explained_disk_errors
from .names import LEFTOVER, OLD, PARTIAL, PathLike, hidden_name


def write_text(path: PathLike, text: str) -> None:
    """Writes UTF-8 text, so that the file is the old one or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file, so that it is the old one or the new one, never a part."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def new_file(path: PathLike) -> Iterator[pathlib.Path]:
    """The name of a file to write, which takes the place of `path` when the block ends without an error.

    Raises:
        OSError: if it cannot be written (disk full, no permission); nothing half-written stays behind.
    """
    target = pathlib.Path(path)
    temporary = hidden_name(target, PARTIAL)
    with explained_disk_errors(target):
        try:
            # Made here, so that it has the mode of any new file; some libraries make theirs private.
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            _finish_file(temporary, mode)
            os.replace(temporary, target)
            _sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `path` when the block ends without an error.

    For folders of this package's own; where the user said to write, use [`output_folder`].

    Raises:
        OSError: if it cannot be written (disk full, no permission); nothing half-written stays behind.
    """
    target = pathlib.Path(path)
    with staged_folder(target) as folder:
        yield folder
        replace_folder(folder, target)


@contextlib.contextmanager
def staged_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill beside `target`, on the same disk; it is gone after the block unless it was moved."""
    with explained_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = hidden_name(target, PARTIAL)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def finish_folder(folder: pathlib.Path) -> None:
    """Puts all files of a folder on the disk, readable like any other new file."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _finish_file(path, mode)
    _sync(folder)


def replace_folder(folder: pathlib.Path, target: pathlib.Path, *, overwrite: bool = True) -> None:
    """Lets a complete folder take the place of another, which is then deleted.

    A kill at any moment leaves one of the two under the name; where the system cannot exchange names in one step,
    [`recover_folder`] brings the old one back.

    Raises:
        FileExistsError: if there is another, not an empty one, and `overwrite` is false.
    """
    finish_folder(folder)
    if not overwrite or not target.exists():
        with contextlib.suppress(OSError):
            target.rmdir()  # if it is empty
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        folder.rename(target)
    elif _exchanged(folder, target):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        old = hidden_name(target, OLD)
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def recover_folder(target: PathLike) -> None:
    """Removes what killed runs left beside a file or folder, and puts back what they were about to replace.

    Nobody else may be writing there: hold [`lock`].
    """
    path = pathlib.Path(target)
    for found in sorted(path.parent.glob(".*")):
        match = LEFTOVER.fullmatch(found.name)
        if match is None or match["name"] != path.name:
            continue
        if match["kind"] == OLD and not path.exists():
            found.rename(path)
        elif found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def remove_folder(path: PathLike) -> None:
    """Deletes a folder of this package's own; a kill on the way leaves no part of it under its name.

    What is then left under another name goes with the next [`recover_folder`].
    """
    folder = pathlib.Path(path)
    removed = hidden_name(folder, PARTIAL)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def recover_contents(folder: PathLike) -> None:
    """[`recover_folder`] for everything in a folder. Nobody else may be writing there: hold its [`lock`]."""
    found = (LEFTOVER.fullmatch(path.name) for path in sorted(pathlib.Path(folder).glob(".*")))
    for name in {match["name"] for match in found if match}:
        recover_folder(pathlib.Path(folder, name))


def _finish_file(path: pathlib.Path, mode: int) -> None:
    """Puts a file on the disk, readable like any other new file: safetensors makes private ones."""
    path.chmod(path.stat().st_mode | mode)
    _sync(path)


def _sync(path: pathlib.Path) -> None:
    """Puts a file, or the names in a folder, on the disk: a name must never be there before its content."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        # Not every file system knows it for folders.
        with contextlib.suppress(OSError) if folder else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchanged(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchanges two names in one step, where the system can (Linux, most file systems)."""
    if sys.platform != "linux":
        return False
    at_working_folder, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(at_working_folder, os.fsencode(first), at_working_folder, os.fsencode(second), exchange) == 0)
