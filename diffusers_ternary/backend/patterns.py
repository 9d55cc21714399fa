# SPDX-License-Identifier: Apache-2.0
"""How a pattern names modules."""

import fnmatch
from collections.abc import Iterable


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names the module `name`, or a module that contains it.

    A pattern with `*`, `?` or `[` is a shell-style glob over the whole name. Any other pattern matches whole dotted
    components anywhere in the name: `"proj_out"` matches `proj_out` and `blocks.3.proj_out`, `"blocks.3"` matches
    everything below it, and neither matches `blocks.30`.
    """
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether any of `patterns` names the module `name`."""
    return any(matches(pattern, name) for pattern in patterns)
