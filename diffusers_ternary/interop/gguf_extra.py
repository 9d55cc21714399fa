# SPDX-License-Identifier: Apache-2.0
"""The `gguf` package, which only GGUF files need."""

import importlib
from typing import Any


class MissingGgufError(ImportError):
    """The `gguf` extra is not installed."""


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        MissingGgufError: if it is not installed; says what to install.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingGgufError(
            f"GGUF files need the gguf package ({error}). Install it with: pip install diffusers-ternary[gguf]"
        ) from error
