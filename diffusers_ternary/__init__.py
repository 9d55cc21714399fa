# SPDX-License-Identifier: Apache-2.0
"""Ternary (1.58-bit) diffusion models for Hugging Face diffusers.

Importing this package registers the quantization backend `diffusers_ternary` with diffusers and transformers.
"""

from .config import TernaryConfig
from .layers import Int8Linear, TernaryLinear
from .quantizers import quantize, register


__version__ = "0.1.0"
__all__ = ["Int8Linear", "TernaryConfig", "TernaryLinear", "quantize"]

register()
