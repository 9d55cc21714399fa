# SPDX-License-Identifier: Apache-2.0
"""What becomes of adapters when a packed model is saved: never dropped, never under a wrong name.

Image prompt adapters (IP-Adapter) are not part of the model, so they are never packed either. They live in the
attention processors, which are modules only then, and in a projection of the picture's embedding: `encoder_hid_proj`
of UNets and Flux, `image_proj` of Stable Diffusion 3.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch


logger = logging.getLogger(__name__)
RecordT = TypeVar("RecordT")
# Kolors projects its text by `encoder_hid_proj`, which `load_ip_adapter` moves away and `unload_ip_adapter` back.
_MOVED, _HOME = "text_encoder_hid_proj.", "encoder_hid_proj."
_INJECTED = (".base_layer.", ".lora_", ".original_module.", ".modules_to_save.")  # of PEFT's layers and wrappers


def refuse_adapters(names: Iterable[str]) -> None:
    """Checks that no adapter layers are injected: their base layers would be stored under names nobody loads.

    Raises:
        ValueError: names one of the tensors, and the remedy.
    """
    injected = next((name for name in names if any(part in name for part in _INJECTED)), None)
    if injected is not None:
        raise ValueError(
            f"The model carries adapter layers ({injected}), which a packed checkpoint cannot hold. Save them with "
            "pipe.save_lora_weights(...) and unload them with pipe.unload_lora_weights() before saving the model "
            "(after pipe.fuse_lora() if the model is to keep what they do)."
        )


def settle_merged(
    state_dict: Mapping[str, torch.Tensor], records: Mapping[str, RecordT], *, once: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, RecordT]]:
    """Stores layers into which adapters were merged as the float layers they have become.

    Either a layer is fused (`fuse_lora`, then `unload_lora_weights`), or a float module took its place (PEFT's
    `merge_and_unload`, Flux's widened input layer). Both arguments are left as they are.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): of the model.
        records (`Mapping[str, RecordT]`): its packed layers by name.
        once (`Collection[str]`, *optional*): layers that were packed when the model was quantized.

    Returns:
        The state dict to store, and the layers that are still packed.

    Raises:
        ValueError: if none is, or something overwrote packed codes with floats.
    """
    tensors = dict(state_dict)
    packed = dict(records)
    unpacked = [layer for layer in once if layer not in records and f"{layer}.weight" in tensors]
    total = len(records) + len(unpacked)
    for layer in records:
        weight = tensors.get(f"{layer}.fused_weight", tensors.get(f"{layer}.weight"))
        if weight is None or not weight.is_floating_point():
            continue
        if f"{layer}.weight_scale" in tensors and f"{layer}.fused_weight" not in tensors:
            raise ValueError(
                f"{layer}.weight was overwritten with {weight.dtype} values beside the scales of its packed codes. "
                "Load or quantize the model again; adapters are merged by fuse_lora() or merge_and_unload()."
            )
        bias = tensors.get(f"{layer}.fused_bias", tensors.get(f"{layer}.bias"))
        tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != layer}
        tensors[f"{layer}.weight"] = weight
        if bias is not None:
            tensors[f"{layer}.bias"] = bias.to(weight.dtype)
        del packed[layer]
    if packed and len(packed) == total:
        return tensors, packed
    if not packed:
        raise ValueError(
            f"Adapters were merged into all {total} packed layers, so none is packed any more. Save a float "
            "model with model.dequantize() and save_pretrained, or fold the adapters into packed weights with "
            "diffusers_ternary.merge_lora."
        )
    logger.warning(
        "%d of %d packed layers hold a merged adapter and are saved unquantized. "
        "diffusers_ternary.merge_lora folds adapters into packed weights instead.",
        total - len(packed),
        total,
    )
    return tensors, packed


def is_image_adapter(name: str) -> bool:
    """Whether a module or tensor of a denoiser belongs to an image prompt adapter, by its name."""
    parts = name.split(".")
    return "processor" in parts or "image_projection_layers" in parts or parts[0] == "image_proj"


def without_image_adapters(
    state_dict: Mapping[str, torch.Tensor], records: Mapping[str, RecordT]
) -> tuple[dict[str, torch.Tensor], dict[str, RecordT]]:
    """The state dict and the packed layers as they were before an image prompt adapter was loaded.

    A checkpoint cannot hold one: nobody would load it from there. Both arguments are left as they are.
    """
    adapter = [name for name in state_dict if is_image_adapter(name)]
    if adapter:
        logger.warning(
            "The image prompt adapter (%d tensors) is not saved with the model: call load_ip_adapter() again after "
            "loading it.",
            len(adapter),
        )

    def home(name: str) -> str:
        if not adapter or not f"{name}.".startswith(_MOVED):
            return name
        return (_HOME + f"{name}.".removeprefix(_MOVED)).rstrip(".")

    tensors = {home(name): tensor for name, tensor in state_dict.items() if not is_image_adapter(name)}
    return tensors, {home(name): record for name, record in records.items() if not is_image_adapter(name)}
