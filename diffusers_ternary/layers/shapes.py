# SPDX-License-Identifier: Apache-2.0
"""The float modules that packed layers stand for, and the matrix that each of them multiplies by."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import QuantizedLayer
from .conv import why_not_convertible


# Exact types: the forward of a subclass may be more than a product.
FLOAT_TYPES = (nn.Linear, nn.Conv2d)
FloatLayer = nn.Linear | nn.Conv2d


def matrix_shape(module: FloatLayer) -> tuple[int, int]:
    """`[N, K]` of the weight with all but its first dimension flattened; K = C * kh * kw of a convolution."""
    if isinstance(module, QuantizedLayer):
        return module.spec.out_features, module.spec.in_features
    weight = module.weight
    return weight.shape[0], weight.numel() // max(1, weight.shape[0])


def reason_not_to_pack(module: FloatLayer) -> str | None:
    """Why no packed layer can stand for this module, or `None` if one can."""
    return why_not_convertible(module) if isinstance(module, nn.Conv2d) else None


def input_rows(module: FloatLayer, x: torch.Tensor) -> torch.Tensor:
    """What the module's matrix is multiplied by, `[M, K]`: tokens, or the patches under a convolution's kernel."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    padding = module.padding
    if isinstance(padding, str):
        # As torch pads: the odd pixel of "same" goes to the end. F.pad counts from the last dimension.
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        height, width = (dilation * (kernel - 1) if padding == "same" else 0 for dilation, kernel in sizes)
        batch = F.pad(batch, (width // 2, width - width // 2, height // 2, height - height // 2))
        padding = (0, 0)
    if module.kernel_size == (1, 1) and padding == (0, 0):
        pixels = batch[:, :, :: module.stride[0], :: module.stride[1]]
        return pixels.movedim(1, -1).reshape(-1, module.in_channels)
    patches = F.unfold(batch, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride)
    return patches.movedim(1, -1).reshape(-1, patches.shape[1])  # [B, C kh kw, L] before


def output_rows(module: FloatLayer, y: torch.Tensor) -> torch.Tensor:
    """What the module's matrix gives for [`input_rows`], `[M, N]`, from an output of the module."""
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    batch = y if y.dim() == 4 else y.unsqueeze(0)
    return batch.movedim(1, -1).reshape(-1, batch.shape[1])
