# SPDX-License-Identifier: Apache-2.0
"""Memory for time on a GPU: the weights of layers that fit are kept unpacked."""

import logging

import torch
from torch import nn

from .ternary import TernaryLayer


logger = logging.getLogger(__name__)


def keep_unpacked(model: nn.Module, max_bytes: int | None = None) -> int:
    """Keeps 8-bit copies of ternary weights on the GPU, so that large products need not unpack them in each call.

    A copy takes four times the packed weight (FLUX.1-dev: 8.6 GB more if all are kept); numbers do not change. Layers
    get one in the order of the model until the memory is used up; `.to()` frees them, and so does `max_bytes=0`. Call
    it when the model is where it will run. Compiled graphs use the packed weight. What it gains was not measured yet.

    Args:
        model (`nn.Module`): holds packed layers.
        max_bytes (`int`, *optional*): what the copies may take together. `None` = what is free.

    Returns:
        `int`: bytes that the copies take; 0 where no layer is on a GPU with 8-bit products.

    Raises:
        ValueError: if `max_bytes` is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} is negative: give a number of bytes, 0 to free the copies, or None.")
    layers = [module for module in model.modules() if isinstance(module, TernaryLayer) and module.is_packed]
    for layer in layers:
        layer.drop_unpacked()
    used = kept = 0
    for layer in layers:
        if max_bytes is not None and used + layer.unpacked_bytes() > max_bytes:
            continue
        try:
            nbytes = layer.keep_unpacked()
        except torch.OutOfMemoryError:
            break
        used += nbytes
        kept += nbytes > 0
    logger.info("%d of %d ternary layers are kept unpacked, %d bytes.", kept, len(layers), used)
    return used
