# SPDX-License-Identifier: Apache-2.0
"""Hashes of files."""

import hashlib

from .names import PathLike


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
