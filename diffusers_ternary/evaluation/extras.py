# SPDX-License-Identifier: Apache-2.0
"""Libraries that only the evaluation needs, imported when they are used."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A library of the `evaluate` extra is not installed."""


def import_extra(module: str) -> Any:
    """Imports a module of the `evaluate` extra.

    Raises:
        MissingExtraError: if it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{package} cannot be imported ({error}). Install it with: pip install diffusers-ternary[evaluate]"
        ) from error
