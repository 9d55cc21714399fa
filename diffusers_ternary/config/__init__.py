# SPDX-License-Identifier: Apache-2.0
"""What the user asks for, and which modules of which architectures that means."""

from .patterns import matches, matches_any
from .policy import ARCHITECTURE_POLICIES, ArchitecturePolicy, KeepRule, policy_for
from .ternary_config import DENOISER_COMPONENTS, QUANT_METHOD, RECOVER, TernaryConfig, TernaryMethod


__all__ = [
    "ARCHITECTURE_POLICIES",
    "DENOISER_COMPONENTS",
    "QUANT_METHOD",
    "RECOVER",
    "ArchitecturePolicy",
    "KeepRule",
    "TernaryConfig",
    "TernaryMethod",
    "matches",
    "matches_any",
    "policy_for",
]
