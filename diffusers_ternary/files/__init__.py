# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are complete or absent, JSON, hashes and locks: how everything in this package is written."""

from .atomic import (
    finish_folder,
    new_file,
    new_folder,
    recover_contents,
    recover_folder,
    remove_folder,
    replace_folder,
    staged_folder,
    write_bytes,
    write_text,
)
from .disk_errors import explained_disk_errors
from .documents import RESTORE, finite, parse_json, parse_json_object, read_json, write_json
from .hashes import file_sha256
from .locks import lock
from .names import PathLike, is_leftover
from .sizes import parse_size
from .temporary import temporary_folder


__all__ = [
    "RESTORE",
    "PathLike",
    "explained_disk_errors",
    "file_sha256",
    "finish_folder",
    "finite",
    "is_leftover",
    "lock",
    "new_file",
    "new_folder",
    "parse_json",
    "parse_json_object",
    "parse_size",
    "read_json",
    "recover_contents",
    "recover_folder",
    "remove_folder",
    "replace_folder",
    "staged_folder",
    "temporary_folder",
    "write_bytes",
    "write_json",
    "write_text",
]
