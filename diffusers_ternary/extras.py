# SPDX-License-Identifier: Apache-2.0
"""Libraries that only some of the tools need: looked for before the work starts, missed with one error."""

import importlib
import importlib.util
from typing import Any


# Library → what to install, where that is not the library itself.
_EXTRAS = {
    "matplotlib": "diffusers-ternary[evaluate]",
    "gguf": "diffusers-ternary[gguf]",
    "scipy": "diffusers-ternary[evaluate]",
    "torchmetrics": "diffusers-ternary[evaluate]",
}


class MissingExtraError(ImportError):
    """A library is not installed; the message says what it is for and how to install it."""


def import_extra(module: str, purpose: str) -> Any:
    """Imports a module of a library that may be missing.

    Args:
        module (`str`): e.g. `"matplotlib.figure"`.
        purpose (`str`): what needs it, for the message: "The plot".

    Raises:
        MissingExtraError: if it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, purpose, str(error)) from error


def has_extra(module: str) -> bool:
    """Whether a library can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: somebody put a module without a spec, or None, in its place
        return False


def check_extra(module: str, purpose: str) -> None:
    """Looks for a library before the work that ends in its use; see [`import_extra`]."""
    if not has_extra(module):
        raise _missing(module, purpose, f"no module named {module!r}")


def _missing(module: str, purpose: str, reason: str) -> MissingExtraError:
    library = module.partition(".")[0]
    package = _EXTRAS.get(library, library)
    return MissingExtraError(f"{purpose} needs {library} ({reason}). Install it with: pip install {package}")
