# SPDX-License-Identifier: Apache-2.0
"""CPU kernels: packed ternary weights times int8 activations in C, and what serves without the compiled library."""

from . import twn  # noqa: F401 (registers itself with ternarize)
from .prepared import prepare
from .products import dequantize, kernel_name, linear_exact, linear_int8


__all__ = ["dequantize", "kernel_name", "linear_exact", "linear_int8", "prepare"]
