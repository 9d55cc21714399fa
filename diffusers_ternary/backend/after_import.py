# SPDX-License-Identifier: Apache-2.0
"""Runs code once another module has been imported, without importing it."""

import importlib.abc
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


logger = logging.getLogger(__name__)


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Calls `callback` once the module `name` has been imported: now, or right after somebody imports it.

    There is one callback per module. An error in it is logged, not raised: it must not break
    the import of somebody else's module.
    """
    if name in sys.modules:
        _call(name, callback)
    elif not any(isinstance(finder, _Watcher) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, callback))


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find one module, and adds to its loader."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _Watcher))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: importlib.abc.Loader) -> None:
        # importlib.util.find_spec("peft") makes a loader too, which nobody runs: only running it counts.
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute  # type: ignore[method-assign]
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _call(self.name, self.callback)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def _call(name: str, callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        logger.warning(
            "diffusers-ternary could not prepare %s for packed layers, and what it does with them may fail. "
            "This version of it is newer or older than those that were tested.",
            name,
            exc_info=True,
        )
