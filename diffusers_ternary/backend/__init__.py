# SPDX-License-Identifier: Apache-2.0
"""The host contract: what diffusers and transformers call while loading and saving.

Importing it imports neither: what needs them is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .registration import register


if TYPE_CHECKING:
    from .checkpoint import StoredTensor, check_headers, read_headers
    from .components import below_compiled_wrappers, modules_of
    from .diffusers import TernaryDiffusersQuantizer
    from .fused_projections import with_separate_projections
    from .placeholders import placeholder_for
    from .plan import ConversionPlan, plan_conversion
    from .quantize import plan_pipeline, replace_layers
    from .sizes import bits_per_weight, file_bytes
    from .summary import packed_layers, summarize
    from .transformers import TernaryTransformersQuantizer

__all__ = [
    "ConversionPlan",
    "StoredTensor",
    "TernaryDiffusersQuantizer",
    "TernaryTransformersQuantizer",
    "below_compiled_wrappers",
    "bits_per_weight",
    "check_headers",
    "file_bytes",
    "modules_of",
    "packed_layers",
    "placeholder_for",
    "plan_conversion",
    "plan_pipeline",
    "read_headers",
    "register",
    "replace_layers",
    "summarize",
    "with_separate_projections",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConversionPlan": ".plan",
        "StoredTensor": ".checkpoint",
        "TernaryDiffusersQuantizer": ".diffusers",
        "TernaryTransformersQuantizer": ".transformers",
        "below_compiled_wrappers": ".components",
        "bits_per_weight": ".sizes",
        "check_headers": ".checkpoint",
        "file_bytes": ".sizes",
        "modules_of": ".components",
        "packed_layers": ".summary",
        "placeholder_for": ".placeholders",
        "plan_conversion": ".plan",
        "plan_pipeline": ".quantize",
        "read_headers": ".checkpoint",
        "replace_layers": ".quantize",
        "summarize": ".summary",
        "with_separate_projections": ".fused_projections",
    },
)
