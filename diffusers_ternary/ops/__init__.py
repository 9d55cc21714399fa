# SPDX-License-Identifier: Apache-2.0
"""The torch operators of this package."""

from .linear import ACTIVATION_DTYPES, kernel_name, ternary_linear


__all__ = ["ACTIVATION_DTYPES", "kernel_name", "ternary_linear"]
