# SPDX-License-Identifier: Apache-2.0
"""Publishing packed models on the Hugging Face Hub."""

from .base_card import BaseCard, read_base_card
from .push import WORK, Publication, check_target, prepare, push_to_hub
from .upload import upload


__all__ = ["WORK", "BaseCard", "Publication", "check_target", "prepare", "push_to_hub", "read_base_card", "upload"]
