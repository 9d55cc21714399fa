# SPDX-License-Identifier: Apache-2.0
"""Makes adapters on packed layers known to PEFT and to diffusers' LoRA loaders."""

from ..backend.after_import import after_import


def register() -> None:
    """Registers now with what is imported already, and with the rest when it is. Calling it again changes nothing."""
    after_import("peft", _register_with_peft)
    after_import("diffusers.loaders.lora_pipeline", _register_with_flux_loader)
    after_import("diffusers.loaders.peft", _register_with_lora_mixin)


def _register_with_peft() -> None:
    from ..backend.summary import count_parameters, has_packed_layers
    from ..layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
    from . import layers, other_methods
    from .compat import (
        DEQUANTIZE_MARK,
        add_custom_modules,
        add_lycoris_modules,
        copy_modules_to_save,
        count_whole_parameters,
        watch_injection,
    )
    from .packed_base import trainable_copy

    setattr(QuantizedLayer, DEQUANTIZE_MARK, property(lambda layer: layer.weight))
    add_custom_modules({QuantizedLinear: layers.TernaryLoraLinear, QuantizedConv2d: layers.TernaryLoraConv2d})
    add_lycoris_modules(
        loha={QuantizedLinear: layers.TernaryLoHaLinear, QuantizedConv2d: layers.TernaryLoHaConv2d},
        lokr={QuantizedLinear: layers.TernaryLoKrLinear, QuantizedConv2d: layers.TernaryLoKrConv2d},
    )
    watch_injection(around=other_methods.shown_as_float, after=other_methods.adopt)
    count_whole_parameters(count_parameters)
    copy_modules_to_save(has_packed_layers, trainable_copy)


def _register_with_flux_loader() -> None:
    from ..backend.compat import patch_flux_expansion
    from ..layers import QuantizedLinear

    patch_flux_expansion(lambda module: isinstance(module, QuantizedLinear))


def _register_with_lora_mixin() -> None:
    from ..backend.compat import patch_lora_mixin
    from ..backend.summary import has_packed_layers

    patch_lora_mixin(has_packed_layers)
