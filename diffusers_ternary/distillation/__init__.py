# SPDX-License-Identifier: Apache-2.0
"""Distillation: a ternary student learns from its own teacher, with prompts only."""

from ..rollouts.prompt_templates import template_prompts
from ..rollouts.prompts import read_prompts
from .config import DistillConfig
from .distill import distill
from .layout import TeacherBatch
from .report import DistillReport


__all__ = ["DistillConfig", "DistillReport", "TeacherBatch", "distill", "read_prompts", "template_prompts"]
