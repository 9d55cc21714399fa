# SPDX-License-Identifier: Apache-2.0
"""Compares a student pipeline with its teacher: the same prompts, the same seeds, and numbers that say how far off."""

from ..extras import MissingExtraError
from ..rollouts import VelocityError
from .benchmarks import GenEval, Scenes, T2ICompBench
from .clip import ClipScore
from .contact_sheet import contact_sheet
from .evaluation import Scorer, TeacherRun, compare, evaluate, observe_teacher
from .judgement import Benchmark
from .report_page import write_report
from .result import EvaluationResult


__all__ = [
    "Benchmark",
    "ClipScore",
    "EvaluationResult",
    "GenEval",
    "MissingExtraError",
    "Scenes",
    "Scorer",
    "T2ICompBench",
    "TeacherRun",
    "VelocityError",
    "compare",
    "contact_sheet",
    "evaluate",
    "observe_teacher",
    "write_report",
]
