# SPDX-License-Identifier: Apache-2.0
"""Other people's ternary models: their formats to packed folders, and packed denoisers to GGUF."""

from .convert import convert
from .gguf_export import GgufReport, export_gguf
from .report import ConversionReport


__all__ = ["ConversionReport", "GgufReport", "convert", "export_gguf"]
