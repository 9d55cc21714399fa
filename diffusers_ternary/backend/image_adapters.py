# SPDX-License-Identifier: Apache-2.0
"""Image prompt adapters (IP-Adapter) that diffusers puts into denoisers: no part of the model, so never packed.

They live in the attention processors, which are modules only then, and in a projection of the picture's embedding:
`encoder_hid_proj` of UNets and Flux, `image_proj` of Stable Diffusion 3.
"""

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch


logger = logging.getLogger(__name__)
RecordT = TypeVar("RecordT")
# Kolors projects its text by `encoder_hid_proj`, which `load_ip_adapter` moves away and `unload_ip_adapter` back.
_MOVED, _HOME = "text_encoder_hid_proj.", "encoder_hid_proj."


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
