# SPDX-License-Identifier: Apache-2.0
"""Moved to `rollouts`."""

from ..rollouts import DenoiserCall, recorded_calls


__all__ = ["DenoiserCall", "recorded_calls"]
