# SPDX-License-Identifier: Apache-2.0
"""Folders among the temporary files."""

import contextlib
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from .disk_errors import explained_disk_errors
from .locks import LOCK, lock


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[pathlib.Path]:
    """A folder among the temporary files, gone after the block; those of killed processes go as well."""
    place = pathlib.Path(tempfile.gettempdir())
    names = {path.name for path in place.glob(f"{prefix}*")}
    names |= {path.name[1 : -len(LOCK)] for path in place.glob(f".{prefix}*{LOCK}")}
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
