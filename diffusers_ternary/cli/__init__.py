# SPDX-License-Identifier: Apache-2.0
"""The command line: `diffusers-ternary`."""

from .app import app, main


__all__ = ["app", "main"]
