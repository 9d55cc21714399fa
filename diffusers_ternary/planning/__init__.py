# SPDX-License-Identifier: Apache-2.0
"""What a pipeline would take, from its headers alone: sizes, memory of every step, and what fits a GPU."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .parts import Part
    from .plan import ComponentPlan, PipelinePlan, plan, plan_parts

__all__ = ["ComponentPlan", "Part", "PipelinePlan", "plan", "plan_parts"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ComponentPlan": ".plan",
        "Part": ".parts",
        "PipelinePlan": ".plan",
        "plan": ".plan",
        "plan_parts": ".plan",
    },
)
