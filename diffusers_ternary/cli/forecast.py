# SPDX-License-Identifier: Apache-2.0
"""How long a command will take and how much memory, predicted before it runs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .console import format_bytes


if TYPE_CHECKING:
    import torch

    from ..backend.config import TernaryConfig
    from ..calibration import CalibrationConfig
    from ..distillation import DistillConfig


class Forecast:
    """Predictions for a pipeline that is loaded, on the device that it will run on.

    Args:
        pipeline (`DiffusionPipeline`): float.
        prompts (`Sequence[str]`): that are drawn.
        call (`Mapping[str, Any]`): all arguments of the call, defaults too.
        device (`torch.device`): where it will run.
        batch_size (`int`): prompts of a call.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        call: Mapping[str, Any],
        device: "torch.device",
        *,
        batch_size: int = 1,
    ) -> None:
        import torch
        from torch import nn

        from ..planning import Part
        from ..planning.durations import Durations, product_rate
        from ..planning.picture import TEXT_TOKENS, Picture

        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.parts = {name: Part.of_model(name, part) for name, part in modules.items()}
        self.denoiser = next(part for part in self.parts.values() if part.denoises)
        side = math.isqrt(int(call.get("height") or 0) * int(call.get("width") or 0)) or 1024
        text = min(TEXT_TOKENS, int(call.get("max_sequence_length") or TEXT_TOKENS))
        self.picture = Picture(side, int(call.get("num_frames") or 1), text)
        self.dtype: torch.dtype = next(self.denoiser.model.parameters()).dtype
        self.device = device
        self.pipeline = pipeline
        self.prompts = len(prompts)
        self.durations = Durations(
            self.denoiser,
            self.parts.values(),
            self.picture,
            calls=int(call.get("num_inference_steps") or 1) * guidance_branches(pipeline, call),
            rate=product_rate(device, self.dtype),
            batch_size=batch_size,
        )

    @staticmethod
    def possible(pipeline: Any) -> bool:
        """Whether the pipeline has a denoiser; the commands say so where it has none."""
        from ..backend.config import DENOISER_COMPONENTS

        names = (name for name, part in pipeline.components.items() if part is not None)
        return any(map(DENOISER_COMPONENTS.fullmatch, names))

    @property
    def tokens(self) -> int:
        """Of a row inside the denoiser."""
        return self.picture.tokens(self.denoiser, self.parts.values())

    def calibrating(self, config: "TernaryConfig", calibration: "CalibrationConfig") -> str:
        """Of `calibrate`."""
        from ..backend import plan_pipeline
        from ..calibration.solve_time import predicted_seconds, ternary_shapes
        from ..planning.durations import spoken
        from ..planning.estimates import ModelEstimate

        plans = plan_pipeline(self.pipeline, config).items()
        models = self.pipeline.components
        shapes = [shape for name, plan in plans for shape in ternary_shapes(models[name], plan, config, calibration)]
        solving = predicted_seconds(shapes, config, calibration, self.device)
        estimate = ModelEstimate(self.denoiser, config.for_component(self.denoiser.name) or config, self.dtype)
        limit = calibration.memory_limit_bytes
        passes = 1 if limit is None else math.ceil(estimate.statistics / limit)
        seconds = self.durations.gathering(self.prompts, passes=passes) + solving
        note = f"of the time {spoken(solving)} to solve {len(shapes)} layers"
        return self._line(seconds, estimate.calibrating(self.tokens), note)

    def distilling(self, config: "TernaryConfig", distill_config: "DistillConfig") -> str:
        """Of `distill`, calibration of its student not counted."""
        from ..distillation.memory import estimate_memory

        memory = estimate_memory(self.denoiser.model, config, distill_config, tokens=self.tokens, dtype=self.dtype)
        rows = distill_config.batch_size * distill_config.gradient_accumulation_steps
        training = self.durations.training(distill_config.updates, rows)
        return self._line(self.durations.drawing(self.prompts) + training, memory.total, "once the student is there")

    def drawing(self, pipelines: Sequence[Any]) -> str:
        """Of drawing with several pipelines, one after the other."""
        from torch import nn

        models = {id(part): part for each in pipelines for part in each.components.values()}
        sizes = [
            tensor.numel() * tensor.element_size()
            for part in models.values()
            if isinstance(part, nn.Module)
            for tensor in part.state_dict().values()
        ]
        return self._line(len(pipelines) * self.durations.drawing(self.prompts), sum(sizes), "weights alone")

    def _line(self, seconds: float, memory: int, note: str) -> str:
        from ..planning.durations import spoken

        return f"predicted: about {spoken(seconds)} on {self.device}, {format_bytes(memory)} ({note})"


def guidance_branches(pipeline: Any, call: Mapping[str, Any]) -> int:
    """Forwards of the denoiser a step: two with classifier-free guidance."""
    if (call.get("true_cfg_scale") or 1) > 1 and call.get("negative_prompt") is not None:
        return 2
    guided = (call.get("guidance_scale") or 0) > 1 and hasattr(type(pipeline), "do_classifier_free_guidance")
    return 2 if guided else 1
