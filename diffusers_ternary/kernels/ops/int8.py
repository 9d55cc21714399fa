# SPDX-License-Identifier: Apache-2.0
"""The product of int8 layers on GPUs; compiled graphs and gradients take torch's operators instead."""

import torch

from ..compat import is_plain
from .serving import TRITON_DEVICE_TYPES, triton_serves


def int8_product(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """`x @ (values * scale).T + bias` by a kernel that reads a byte for each weight; `None` where none serves.

    Args:
        x (`torch.Tensor`): float `[..., K]`.
        values (`torch.Tensor`): int8 `[N, K]`.
        scale (`torch.Tensor`): float `[N, 1]`.
        bias (`torch.Tensor`, *optional*): float `[N]`.
        activation_dtype (`str`): of the layer. `"auto"` and `"int8"` round the activations of large products to int8.
    """
    if x.device.type not in TRITON_DEVICE_TYPES or torch.compiler.is_compiling():
        return None
    if not is_plain(x) or (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
        return None
    if not triton_serves(x.device):
        return None
    from .. import triton as kernels

    return kernels.int8_linear(x, values.detach().contiguous(), scale.detach(), bias, activation_dtype)
