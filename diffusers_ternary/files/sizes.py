# SPDX-License-Identifier: Apache-2.0
"""Numbers of bytes as people write them."""

import re


_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])?(i)?B)?\s*", re.IGNORECASE)


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
