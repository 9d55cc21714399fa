# SPDX-License-Identifier: Apache-2.0
"""The hidden names of what is being written or replaced, by which the next run knows what a killed one left."""

import os
import pathlib
import re
import secrets


PathLike = str | os.PathLike[str]
PARTIAL, OLD = "partial", "old"
# A letter is always among the digits: `.model.20240131.old` is a backup of the user's.
LEFTOVER = re.compile(rf"\.(?P<name>.+)\.(?=\d*[a-f])[0-9a-f]{{8}}\.(?P<kind>{PARTIAL}|{OLD})", re.DOTALL)


def hidden_name(target: pathlib.Path, kind: str) -> pathlib.Path:
    """A new name beside `target`, on the same disk, of a kind (`PARTIAL` or `OLD`)."""
    token = secrets.choice("abcdef") + secrets.token_hex(4)[1:]
    return target.with_name(f".{target.name}.{token}.{kind}")


def is_leftover(path: pathlib.Path) -> bool:
    """Whether a name is that of a result that was being written, or replaced, when its process was killed."""
    return LEFTOVER.fullmatch(path.name) is not None
