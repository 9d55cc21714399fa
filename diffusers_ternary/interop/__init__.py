# SPDX-License-Identifier: Apache-2.0
"""Other people's ternary models: their formats to packed folders, and packed denoisers to GGUF and mflux."""

from .convert import convert
from .gguf_export import GgufReport, export_gguf
from .mflux_export import MfluxReport, export_mflux
from .report import ConversionReport


__all__ = ["ConversionReport", "GgufReport", "MfluxReport", "convert", "export_gguf", "export_mflux"]
