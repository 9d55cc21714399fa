# SPDX-License-Identifier: Apache-2.0
"""Ternary (1.58-bit) diffusion models for Hugging Face diffusers."""

__version__ = "0.1.0"
