# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/scenes as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


FOLDER = Path(__file__).parents[2] / "examples" / "scenes"


def examples(name: str) -> ModuleType:
    """Import one script under its own name; the scripts import each other by theirs."""
    if name not in sys.modules:
        sys.path.insert(0, str(FOLDER))
        try:
            importlib.import_module(name)
        finally:
            sys.path.remove(str(FOLDER))
    return sys.modules[name]
