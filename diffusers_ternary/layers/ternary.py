# SPDX-License-Identifier: Apache-2.0
"""The ternary linear layer."""

from typing import Any

import torch
from torch import nn

from ..format import TernarySpec
from ..kernels import reference
from ..ops import kernel_name, ternary_linear
from ..ternarize import TernaryWeight, ternarize
from .base import QuantizedLinear


class TernaryLinear(QuantizedLinear):
    """`nn.Linear` with a packed ternary weight: 2-bit planes in memory, base-3 in files.

    Args: see [`QuantizedLinear`]; `spec` is a [`TernarySpec`].
    """

    packed_names = ("weight", "weight_scale", "weight_multiplier")
    spec: TernarySpec
    weight_multiplier: nn.Parameter | None

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return kernel_name(self.weight.device.type, self.activation_dtype)

    @classmethod
    def from_weight(cls, packed: TernaryWeight, bias: torch.Tensor | None = None, **options: Any) -> "TernaryLinear":
        """Builds the layer around an already packed weight."""
        layer = cls(packed.spec, bias is not None, device="meta", **options)
        layer.install_weight(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def install_weight(self, packed: TernaryWeight) -> None:
        """Installs a packed weight, whose spec may differ from the placeholder's in its scale layout."""
        self.spec = packed.spec
        self.install(weight=packed.packed, weight_scale=packed.scale, weight_multiplier=packed.multiplier)

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: Any) -> None:
        """Ternarizes a float weight `[N, K]` (`options`: see [`ternarize`]) and installs it."""
        self.install_weight(ternarize(weight, group_size=self.spec.group_size, name=name, **options))

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dense weight `[N, K]` in `dtype` (default: the compute dtype, else float32)."""
        return reference.dequantize(
            self.weight,
            self.scales,
            self.weight_multiplier,
            in_features=self.in_features,
            group_size=self.spec.group_size,
            dtype=dtype or self.compute_dtype or torch.float32,
        )

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return ternary_linear(
            x,
            self.weight,
            self.scales,
            self.weight_multiplier,
            self.bias,
            self.in_features,
            self.spec.group_size,
            self.activation_dtype,
        )

    def _repr_details(self) -> str:
        return f"group_size={self.spec.group_size}, scales={self.spec.scales}, activations={self.activation_dtype}, "
