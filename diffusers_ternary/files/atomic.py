# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are complete or absent, JSON, hashes and locks: how everything in this package is written.

A result is written beside its place, under a hidden name that ends in `.partial`, and takes its place when it is
complete and on the disk. What a killed run leaves behind is removed by the next one.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import filelock
from safetensors import SafetensorError


logger = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]

RESTORE = "Restore the file."
_PARTIAL, _OLD, _LOCK = "partial", "old", ".lock"
# A letter is always among the digits: `.model.20240131.old` is a backup of the user's.
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.(?=\d*[a-f])[0-9a-f]{{8}}\.(?P<kind>{_PARTIAL}|{_OLD})", re.DOTALL)
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])?(i)?B)?\s*", re.IGNORECASE)
_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


# --- JSON ---------------------------------------------------------------------------------------------------------


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


def write_json(path: PathLike, content: Any, *, allow_nan: bool = True) -> None:
    """Writes JSON, so that the file is the old one or the new one, never a part.

    Args:
        path (`str` or `os.PathLike`): the file.
        content: JSON values.
        allow_nan (`bool`, *optional*, defaults to `True`): write numbers that are not finite, which few readers know.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def parse_size(value: int | str, *, name: str) -> int:
    """A number of bytes: `500_000_000`, `"500MB"`, `"1.5 GiB"`.

    Args:
        value (`int` or `str`): what was given.
        name (`str`): of the argument, for messages.

    Raises:
        ValueError: for anything else, and for a size that is not positive or that no disk has.
    """
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper()))
    if not 0 < size < 1 << 60:
        raise ValueError(f"{name}={value!r} is not a positive size such as '400MB' or '6GiB'.")
    return size


# --- Files --------------------------------------------------------------------------------------------------------


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
    temporary = _beside(target, _PARTIAL)
    with explained_disk_errors(target):
        try:
            # Made here, so that it has the mode of any new file; some libraries make theirs private.
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# --- Folders ------------------------------------------------------------------------------------------------------


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
        folder = _beside(target, _PARTIAL)
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
            path.chmod(path.stat().st_mode | mode)  # safetensors makes files private
            _sync(path)
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
        old = _beside(target, _OLD)
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
        match = _LEFTOVER.fullmatch(found.name)
        if match is None or match["name"] != path.name:
            continue
        if match["kind"] == _OLD and not path.exists():
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
    removed = _beside(folder, _PARTIAL)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def is_leftover(path: pathlib.Path) -> bool:
    """Whether a name is that of a result that was being written, or replaced, when its process was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None


def recover_contents(folder: PathLike) -> None:
    """[`recover_folder`] for everything in a folder. Nobody else may be writing there: hold its [`lock`]."""
    found = (_LEFTOVER.fullmatch(path.name) for path in sorted(pathlib.Path(folder).glob(".*")))
    for name in {match["name"] for match in found if match}:
        recover_folder(pathlib.Path(folder, name))


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[pathlib.Path]:
    """A folder among the temporary files, gone after the block; those of killed processes go as well."""
    place = pathlib.Path(tempfile.gettempdir())
    names = {path.name for path in place.glob(f"{prefix}*")}
    names |= {path.name[1 : -len(_LOCK)] for path in place.glob(f".{prefix}*{_LOCK}")}
    for path in (place / name for name in names):
        with contextlib.suppress(OSError), lock(path, "another process") as stale:
            if stale:
                shutil.rmtree(path, ignore_errors=True)
    folder = place / f"{prefix}{secrets.token_hex(8)}"
    # The lock comes first: a folder without one is nobody's.
    with lock(folder, "this process"), explained_disk_errors(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# --- Hashes -------------------------------------------------------------------------------------------------------


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- Locks --------------------------------------------------------------------------------------------------------


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
        raise _no_place(target, error) from error
    file = target.with_name(f".{target.name}{_LOCK}")
    holder = filelock.FileLock(file, blocking=False, thread_local=False)
    held = True
    try:
        holder.acquire()
    except filelock.Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN, f"{target} is in use by {what}. Wait until that has ended, or choose another place"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, *_DISK_ERRORS}:
            raise _no_place(target, error) from error
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


# --- Errors -------------------------------------------------------------------------------------------------------


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
        if number not in _DISK_ERRORS:
            raise
        place = getattr(error, "place", None) or getattr(error, "filename", None) or os.fspath(target)
        hidden = any(_LEFTOVER.fullmatch(part) for part in pathlib.Path(place).parts)
        where = "" if hidden or pathlib.Path(place) == pathlib.Path(target) else f" at {place}"
        explained = OSError(
            number,
            f"{os.fspath(target)} cannot be written: {os.strerror(number)}{where}. Nothing incomplete was left "
            "behind. Free space or choose another place, and run again.",
        )
        explained.place = place  # type: ignore[attr-defined]
        raise explained from error


def _no_place(target: pathlib.Path, error: OSError) -> OSError:
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


def _beside(target: pathlib.Path, kind: str) -> pathlib.Path:
    token = secrets.choice("abcdef") + secrets.token_hex(4)[1:]
    return target.with_name(f".{target.name}.{token}.{kind}")


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
