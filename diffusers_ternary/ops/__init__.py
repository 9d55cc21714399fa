# SPDX-License-Identifier: Apache-2.0
"""The torch operators of this package."""

from . import triton  # noqa: F401 (registers the operators on GPUs)
from .dequantize import ternary_dequantize
from .linear import ACTIVATION_DTYPES, ternary_linear
from .rotate import ternary_rotate
from .serving import kernel_name


__all__ = ["ACTIVATION_DTYPES", "kernel_name", "ternary_dequantize", "ternary_linear", "ternary_rotate"]
