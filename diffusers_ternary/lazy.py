# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first used: torch and diffusers take seconds."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package (`str`): its `__name__`.
        places (`Mapping[str, str]`): name → module that has it, relative to the package.
    """
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name], package), name)
        setattr(module, name, value)  # asked for once
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *places})

    return get, names
