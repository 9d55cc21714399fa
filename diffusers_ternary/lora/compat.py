# SPDX-License-Identifier: Apache-2.0
"""The names of PEFT that are not part of its documented API; apart from `compat`, because this imports PEFT.

Each has a canary in `integration_tests/lora/test_compat.py`, which fails readably when a new version moves it.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.boft.layer import Conv2d as BOFTConv2d
from peft.tuners.boft.layer import Linear as BOFTLinear
from peft.tuners.ia3.layer import Conv2d as IA3Conv2d
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.loha.layer import Conv2d as LoHaConv2d
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import Conv2d as LoKrConv2d
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.miss.layer import MissLinear
from peft.tuners.oft.layer import Conv2d as OFTConv2d
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.shira.layer import Linear as ShiraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.vera.layer import Linear as VeraLinear
from peft.utils import ModulesToSaveWrapper
from peft.utils.quantization_utils import QuantizationBackend


__all__ = [
    "DEQUANTIZE_MARK",
    "BOFTConv2d",
    "BOFTLinear",
    "BaseTunerLayer",
    "IA3Conv2d",
    "IA3Linear",
    "LoHaConv2d",
    "LoHaLinear",
    "LoKrConv2d",
    "LoKrLinear",
    "LoraConv2d",
    "LoraLinear",
    "MissLinear",
    "ModulesToSaveWrapper",
    "OFTConv2d",
    "OFTLinear",
    "PeftModel",
    "QuantizationBackend",
    "ShiraLinear",
    "VeraLinear",
    "add_custom_modules",
    "add_lycoris_modules",
    "check_adapters_to_merge",
    "copy_modules_to_save",
    "count_whole_parameters",
    "watch_injection",
]

# PEFT calls `dequantize()` of a layer that has this attribute, wherever it needs the float weight (DoRA's norms).
DEQUANTIZE_MARK = "W_q"


def add_custom_modules(mapping: Mapping[type, type]) -> None:
    """Makes every `LoraConfig` from now on use `mapping` (base layer → adapter layer).

    PEFT registers custom modules per config, but diffusers makes configs itself: hence in the constructor.
    """
    original: Callable[[Any], None] = LoraConfig.__post_init__
    if getattr(original, "custom_modules", None) == mapping:
        return

    def post_init(config: Any) -> None:
        original(config)
        config._register_custom_module(dict(mapping))

    post_init.custom_modules = mapping  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = post_init  # type: ignore[method-assign]


def add_lycoris_modules(*, loha: Mapping[type, type], lokr: Mapping[type, type]) -> None:
    """Makes LoHa and LoKr use these adapter layers (base layer → adapter layer)."""
    # The first match counts, so ours go before nn.Linear and nn.Conv2d.
    LoHaModel.layers_mapping = {**loha, **LoHaModel.layers_mapping}
    LoKrModel.layers_mapping = {**lokr, **LoKrModel.layers_mapping}


def count_whole_parameters(count: Callable[[Any], int]) -> None:
    """Makes PEFT's `get_nb_trainable_parameters`, and what prints it, count all parameters with `count(model)`."""

    def counting(original: Callable[[Any], tuple[int, int]]) -> Callable[[Any], tuple[int, int]]:
        @functools.wraps(original)
        def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
            return original(self)[0], count(self)

        return get_nb_trainable_parameters

    for cls in (PeftModel, PeftMixedModel):
        if not hasattr(cls.get_nb_trainable_parameters, "__wrapped__"):
            cls.get_nb_trainable_parameters = counting(cls.get_nb_trainable_parameters)  # type: ignore[method-assign]


def copy_modules_to_save(is_packed: Callable[[Any], bool], trainable_copy: Callable[[Any], Any]) -> None:
    """Makes PEFT train and save (`modules_to_save`) a float copy of packed modules, which it would copy as they are.

    Args:
        is_packed (`Callable`): whether a module holds packed layers.
        trainable_copy (`Callable`): gives the float copy of one.
    """
    original = ModulesToSaveWrapper.update
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        packed = self.original_module
        if adapter_name in self.modules_to_save or not is_packed(packed):
            original(self, adapter_name, *args, **kwargs)
            return
        self.original_module = trainable_copy(packed)
        try:
            original(self, adapter_name, *args, **kwargs)
        finally:
            self.original_module = packed

    ModulesToSaveWrapper.update = update  # type: ignore[method-assign]


def watch_injection(
    *, around: Callable[[Any, Any], AbstractContextManager[None]], after: Callable[[Any], None]
) -> None:
    """Has a look at every adapter layer, of whatever method, that PEFT makes.

    Args:
        around (`Callable`): gets the adapter's config and the layer that is to get it; may raise. The adapter layer is
            made within the context that it returns.
        after (`Callable`): gets every module of the model, adapter layers included.
    """
    original = BaseTuner.inject_adapter
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        create = self._create_and_replace

        def checked(config: Any, adapter_name: str, target: Any, *rest: Any, **options: Any) -> None:
            with around(config, target):
                create(config, adapter_name, target, *rest, **options)

        self._create_and_replace = checked
        try:
            original(self, model, *args, **kwargs)
        finally:
            del self._create_and_replace
        for module in model.modules():
            after(module)

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]
