# SPDX-License-Identifier: Apache-2.0
"""The names of PEFT that are not part of its documented API; apart from `compat`, because this imports PEFT.

Each has a canary in `integration_tests/unit/test_compat_peft.py`, which fails readably when a new version moves it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.loha.layer import Conv2d as LoHaConv2d
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import Conv2d as LoKrConv2d
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge


__all__ = [
    "DEQUANTIZE_MARK",
    "BaseTunerLayer",
    "LoHaConv2d",
    "LoHaLinear",
    "LoKrConv2d",
    "LoKrLinear",
    "LoraConv2d",
    "LoraLinear",
    "PeftModel",
    "add_custom_modules",
    "add_lycoris_modules",
    "check_adapters_to_merge",
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


def watch_injection(*, before: Callable[[Any, Any], None], after: Callable[[Any], None]) -> None:
    """Has a look at every adapter layer, of whatever method, that PEFT makes.

    Args:
        before (`Callable`): gets the adapter's config and the layer that is to get it; may raise.
        after (`Callable`): gets every module of the model, adapter layers included.
    """
    original = BaseTuner.inject_adapter
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        create = self._create_and_replace

        def checked(config: Any, adapter_name: str, target: Any, *rest: Any, **options: Any) -> None:
            before(config, target)
            create(config, adapter_name, target, *rest, **options)

        self._create_and_replace = checked
        try:
            original(self, model, *args, **kwargs)
        finally:
            del self._create_and_replace
        for module in model.modules():
            after(module)

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]
