# SPDX-License-Identifier: Apache-2.0
"""Makes `diffusers_ternary` known to diffusers and transformers, and its operators to torch; imports none of them."""

import sys
from collections.abc import Callable
from typing import Any

from .after_import import after_import
from .method import QUANT_METHOD


_PACKAGE = __package__.partition(".")[0]


def register() -> None:
    """Registers now with what is imported already, and with the rest when it is. Calling it again changes nothing."""
    after_import("torch", _register_operators)
    after_import("diffusers.quantizers.auto", _register_with_diffusers)
    after_import("transformers.quantizers.auto", _register_with_transformers)
    after_import("diffusers.modular_pipelines.modular_pipeline", _patch_modular_loading)


class _Deferred:
    """Stands for a class in the registry of a host until the host uses it.

    The registries are there while the host is still being imported; our classes inherit from the host's.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._load())  # diffusers asks so of the configs in a quant_mapping


def _register_operators() -> None:
    # What the operators are built from may be what imports torch, and is not ready then. Layers bring them later.
    if any(f"{_PACKAGE}.{room}" in sys.modules for room in ("format", "ternarize", "kernels")):
        return
    from ..kernels import ops  # noqa: F401 (exported programs name the operators, and import no layers)


def _register_with_diffusers() -> None:
    from .compat_registries import diffusers_registries

    configs, quantizers = diffusers_registries()
    configs[QUANT_METHOD] = _Deferred(_config)
    quantizers[QUANT_METHOD] = _Deferred(_diffusers_quantizer)


def _register_with_transformers() -> None:
    from .compat_registries import transformers_registries

    # The same as transformers' register_* decorators, which refuse to run twice (a reload would then fail).
    configs, quantizers = transformers_registries()
    configs[QUANT_METHOD] = _Deferred(_config)
    quantizers[QUANT_METHOD] = _Deferred(_transformers_quantizer)


def _patch_modular_loading() -> None:
    from .compat import patch_modular_loading

    patch_modular_loading(_config())


def _config() -> Any:
    from .config import TernaryConfig

    return TernaryConfig


def _diffusers_quantizer() -> Any:
    from .diffusers import TernaryDiffusersQuantizer

    return TernaryDiffusersQuantizer


def _transformers_quantizer() -> Any:
    from .transformers import TernaryTransformersQuantizer

    return TernaryTransformersQuantizer
