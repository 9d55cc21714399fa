# SPDX-License-Identifier: Apache-2.0
"""The int8 linear layer, for modules that ternary would hurt."""

from typing import Any

import torch
import torch.nn.functional as F

from ..format import Int8Spec
from ..ternarize import Int8Weight, quantize_int8
from .base import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """`nn.Linear` with a symmetric int8 weight and one scale per row, multiplied in the input's dtype.

    Args: see [`QuantizedLinear`]; `spec` is an [`Int8Spec`].
    """

    spec: Int8Spec

    def install_weight(self, quantized: Int8Weight) -> None:
        """Installs an int8 weight."""
        self.install(weight=quantized.values, weight_scale=quantized.scale)

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: Any) -> None:
        """Quantizes a float weight `[N, K]` and installs it (int8 has no options; those of ternary are ignored)."""
        self.install_weight(quantize_int8(weight, name=name))

    def _dequantize_packed(self) -> torch.Tensor:
        return self.weight.float() * self.scales.float()

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._dequantize_packed().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
