# SPDX-License-Identifier: Apache-2.0
"""Publishing packed models on the Hugging Face Hub."""

from .base_card import BaseCard, read_base_card
from .push import WORK, Publication, check_target, prepare, publish, push_to_hub


__all__ = ["WORK", "BaseCard", "Publication", "check_target", "prepare", "publish", "push_to_hub", "read_base_card"]
