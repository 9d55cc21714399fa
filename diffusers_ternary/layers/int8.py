# SPDX-License-Identifier: Apache-2.0
"""Layers with int8 weights, for modules that ternary would hurt."""

from typing import Any

import torch
import torch.nn.functional as F

from ..format import Int8Spec
from ..kernels.ops import check_devices, check_float, int8_product
from ..ternarize import quantize_int8
from .base import QuantizedLayer
from .conv import QuantizedConv2d
from .linear import QuantizedLinear


class Int8Layer(QuantizedLayer):
    """What int8 layers store: a symmetric int8 weight and one scale per row. `spec` is an [`Int8Spec`]."""

    spec: Int8Spec

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: Any) -> None:
        """Quantizes a float weight of shape `weight_shape` and installs it.

        int8 has no options; those of ternary are ignored.
        """
        self.install_weight(quantize_int8(weight.flatten(1), name=name))

    def matrix(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the dense weight matrix, `[n, K]`: formed in float32 and rounded once to `dtype`."""
        weight, scale = self.weight[rows], self.scales[rows].float()
        if weight.device.type == "cpu" or torch.compiler.is_compiling():
            return (weight.float() * scale).to(dtype)  # of which a compiler makes one loop
        return scaled_in_one_pass(weight, scale, dtype)

    def multiply_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` times the matrix, plus the bias, in the dtype of `x`: `[..., N]`."""
        check_float(x)
        check_devices(x.device, "the input", weight=self.weight, scale=self.weight_scale, bias=self.bias)
        product = int8_product(x, self.weight, self.scales, self.bias, self.activation_dtype)
        if product is not None:
            return product
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def scaled_in_one_pass(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(weight.float() * scale).to(dtype)`, the same bits: GPUs convert on the way, and 3 bytes move instead of 19."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


class Int8Linear(QuantizedLinear, Int8Layer):
    """`nn.Linear` with a symmetric int8 weight.

    Args: see [`QuantizedLinear`]; `spec` is an [`Int8Spec`].
    """


class Int8Conv2d(QuantizedConv2d, Int8Layer):
    """`nn.Conv2d` without groups and with a symmetric int8 weight.

    Args: see [`QuantizedConv2d`]; `spec` is an [`Int8Spec`] with `in_features` = C * kh * kw.
    """
