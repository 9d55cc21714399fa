# SPDX-License-Identifier: Apache-2.0
"""Packed layers back to float ones."""

import torch
from torch import nn

from .compat_offload import casting_hook, load_tensors, move_hooks, placed_as_a_whole, without_group_offloading
from .summary import packed_layers


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces every packed layer of `model` by the float module it stands for, one at a time.

    Float modules are offloaded and cast between calls as the packed ones were; what was offloaded to disk by
    accelerate is kept on the CPU.

    Args:
        model (`nn.Module`): changed in place.
        dtype (`torch.dtype`, *optional*): of the new weights; default: the dtype of the layer's bias, else the
            model's first floating parameter, else float32. Layerwise casting: the dtype of the product.

    Raises:
        ValueError: if accelerate loads a block with all that is in it at once; nothing is changed then.
    """
    layers = packed_layers(model)
    whole = placed_as_a_whole(model)
    if whole is not None and any(name.startswith(f"{whole}.") for name in layers):
        raise ValueError(
            f"{whole} is offloaded as a whole (preload_module_classes), so the layers in it cannot be replaced. Call "
            "accelerate.hooks.remove_hook_from_submodules(model), or load the model without offloading."
        )
    with without_group_offloading(model, keep=True):
        floating = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
        fallback = next(floating, torch.float32)
        for name, layer in layers.items():
            load_tensors(layer)
            casting = casting_hook(layer)
            own = fallback if layer.bias is None else layer.bias.dtype
            own = own if casting is None else casting.compute_dtype
            module = layer.to_float(dtype or layer.compute_dtype or own)
            model.set_submodule(name, module)
            move_hooks(layer, module)
