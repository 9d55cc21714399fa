# SPDX-License-Identifier: Apache-2.0
"""From a model's state dict to what goes into a packed file."""

from collections.abc import Collection, Mapping

import torch

from ..format import FileLayout, LayerSpec
from ..layers import LayerRecord
from ..progress import Bar
from .adapters import refuse_adapters, settle_merged, without_image_adapters
from .checkpoint import owner, to_file
from .fused_projections import without_fused_projections


def state_dict_to_file(
    state_dict: Mapping[str, torch.Tensor], records: Mapping[str, LayerRecord], *, once: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], FileLayout]:
    """Turns a model's state dict into what goes into a packed file. `state_dict` is left as it is.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): of the model.
        records (`Mapping[str, LayerRecord]`): its packed layers, see [`read_records`].
        once (`Collection[str]`, *optional*): layers that were packed once, for messages.

    Returns:
        The tensors to store, and the layout that describes them.

    Raises:
        ValueError: if adapters are injected or merged into every layer or into a fused projection, or a packed layer
            is not in the state dict as it was recorded.
    """
    refuse_adapters(state_dict)
    # `blocks[0] = torch.compile(blocks[0])` puts its wrapper into the names, and no model would have such layers.
    state_dict = {_uncompiled(name): tensor for name, tensor in state_dict.items()}
    records = {_uncompiled(name): record for name, record in records.items()}
    once = [_uncompiled(name) for name in once]
    state_dict, records = without_image_adapters(state_dict, records)
    state_dict, records = without_fused_projections(state_dict, records)
    state_dict, records = settle_merged(state_dict, records, once=once)
    specs = {name: record.spec for name, record in records.items()}
    _check_memory(state_dict, specs)
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in Bar(state_dict.items(), "Packing for the file"):
        part = owner(name, specs)
        if part is None:
            converted[name] = tensor
        else:
            layer, suffix = part
            converted[name] = to_file(suffix, tensor, specs[layer], records[layer].scale_dtype)
    return converted, FileLayout.of_tensors(specs, converted)


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _check_memory(state_dict: Mapping[str, torch.Tensor], specs: Mapping[str, LayerSpec]) -> None:
    for layer, spec in specs.items():
        for suffix, expected in spec.memory_tensors().items():
            tensor = state_dict.get(f"{layer}.{suffix}")
            if tensor is None or tuple(tensor.shape) != expected.shape:
                found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
                raise ValueError(
                    f"Cannot save: {layer}.{suffix} {found}, but the layer was packed as {list(expected.shape)}. "
                    "Its module was replaced after quantization; quantize the model again."
                )
