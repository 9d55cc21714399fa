# SPDX-License-Identifier: Apache-2.0
"""Scenes: GenEval's six tasks drawn with silhouettes, so that labels are exact: its prompts, its split, its judge."""
