# SPDX-License-Identifier: Apache-2.0
"""Distillation: a ternary student learns from its own teacher, with prompts only."""

from .batch import TeacherBatch
from .config import DistillConfig
from .distill import distill
from .prompt_templates import template_prompts
from .prompts import read_prompts
from .report import DistillReport


__all__ = ["DistillConfig", "DistillReport", "TeacherBatch", "distill", "read_prompts", "template_prompts"]
