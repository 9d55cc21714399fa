# SPDX-License-Identifier: Apache-2.0
"""Other people's ternary models: their formats to packed folders, and packed denoisers to GGUF and mflux."""

from .convert import convert
from .export import ExportReport
from .gguf_export import export_gguf
from .mflux_export import export_mflux
from .packing import ConversionReport


__all__ = ["ConversionReport", "ExportReport", "convert", "export_gguf", "export_mflux"]
