# SPDX-License-Identifier: Apache-2.0
"""Other people's ternary models: their formats to packed folders, and packed denoisers to GGUF and mflux."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .export import ExportReport
    from .gguf_export import export_gguf
    from .mflux_export import export_mflux
    from .packing import ConversionReport

__all__ = ["ConversionReport", "ExportReport", "export_gguf", "export_mflux"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConversionReport": ".packing",
        "ExportReport": ".export",
        "export_gguf": ".gguf_export",
        "export_mflux": ".mflux_export",
    },
)
