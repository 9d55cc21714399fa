# SPDX-License-Identifier: Apache-2.0
"""Packed layers that stand for `nn.Linear`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..format import LayerSpec
from ..kernels.compat import any_autocast
from ..kernels.ops import check_devices, check_float
from .base import QuantizedLayer


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Base of the packed linear layers.

    Args:
        spec ([`LayerSpec`]): what the layer stores.
        bias (`bool`): whether there is a bias.
        activation_dtype (`str`): dtype the activations are rounded to, see [`TernaryConfig`].
        compute_dtype (`torch.dtype`, *optional*): dtype of the product; `None` follows the input.
        device, dtype: of the placeholder weight and the bias.
    """

    bias: Any  # a Parameter or None; nn.Linear lets it look like a Parameter always

    def __init__(
        self,
        spec: LayerSpec,
        bias: bool = True,
        *,
        activation_dtype: str = "none",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self._become_placeholder(spec, bias, activation_dtype, compute_dtype, device, dtype)

    def float_module(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
        """`nn.Linear` around a weight `[N, K]` and a bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return self._fill_float(linear, weight, bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[`QuantizedLayer.forward`]; the usual call goes straight to the product."""
        if self.compute_dtype is None and self._parameters["fused_weight"] is None and not any_autocast():
            return self.multiply_rows(input)
        return super().forward(input)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply_rows(x)

    def _multiply_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        check_float(x)
        check_devices(x.device, "the input", weight=weight, bias=bias)
        return F.linear(x, weight, bias)
