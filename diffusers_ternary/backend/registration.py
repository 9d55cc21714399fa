# SPDX-License-Identifier: Apache-2.0
"""Makes `diffusers_ternary` known to diffusers and transformers."""

from functools import partial

from .after_import import after_import
from .compat import (
    DIFFUSERS_CONFIGS,
    DIFFUSERS_QUANTIZERS,
    TRANSFORMERS_CONFIGS,
    TRANSFORMERS_QUANTIZERS,
    patch_modular_loading,
)
from .config import QUANT_METHOD, TernaryConfig
from .diffusers import TernaryDiffusersQuantizer
from .transformers import TernaryTransformersQuantizer


def register() -> None:
    """Registers the config and both quantizers. Calling it again changes nothing."""
    DIFFUSERS_CONFIGS[QUANT_METHOD] = TernaryConfig
    DIFFUSERS_QUANTIZERS[QUANT_METHOD] = TernaryDiffusersQuantizer
    # The same as transformers' register_* decorators, which refuse to run twice (a reload would then fail).
    TRANSFORMERS_CONFIGS[QUANT_METHOD] = TernaryConfig
    TRANSFORMERS_QUANTIZERS[QUANT_METHOD] = TernaryTransformersQuantizer
    after_import("diffusers.modular_pipelines.modular_pipeline", partial(patch_modular_loading, TernaryConfig))
