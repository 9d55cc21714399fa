# SPDX-License-Identifier: Apache-2.0
"""Publishing packed models on the Hugging Face Hub."""

from .push import Publication, check_target, prepare, publish, push_to_hub


__all__ = ["Publication", "check_target", "prepare", "publish", "push_to_hub"]
