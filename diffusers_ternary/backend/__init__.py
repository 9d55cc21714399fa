# SPDX-License-Identifier: Apache-2.0
"""The host contract: what diffusers and transformers call while loading and saving, and `quantize`."""

from .checkpoint import StoredTensor, check_headers, read_headers
from .components import below_compiled_wrappers, modules_of
from .diffusers import TernaryDiffusersQuantizer
from .fused_projections import with_separate_projections
from .placeholders import placeholder_for
from .plan import ConversionPlan, plan_conversion
from .quantize import plan_pipeline, quantize, replace_layers
from .registration import register
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
    "quantize",
    "read_headers",
    "register",
    "replace_layers",
    "summarize",
    "with_separate_projections",
]
