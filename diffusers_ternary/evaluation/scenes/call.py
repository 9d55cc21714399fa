# SPDX-License-Identifier: Apache-2.0
"""The one call that draws Scenes: every published score was measured with it, every student was made for it."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, FluxPipeline, SanaPipeline

from .detector import CANVAS


STEPS = 8
GUIDANCE = 3.0


def scenes_call(pipeline: DiffusionPipeline, *, steps: int = STEPS, guidance: float = GUIDANCE) -> dict[str, Any]:
    """Arguments of ``pipeline(prompt, ...)`` beside the prompt and the noise.

    Args:
        pipeline: The Flux or the SANA teacher, or a quantized version of it.
        steps: Denoising steps.
        guidance: Of classifier-free guidance, away from the empty prompt; 1 leaves it out and takes half the time.

    Raises:
        TypeError: If it is another pipeline.
    """
    call: dict[str, Any] = {"height": CANVAS, "width": CANVAS, "num_inference_steps": steps}
    if isinstance(pipeline, FluxPipeline):
        call |= {"guidance_scale": 0.0, "true_cfg_scale": guidance}
    elif isinstance(pipeline, SanaPipeline):
        call |= {"guidance_scale": guidance, "use_resolution_binning": False, "complex_human_instruction": None}
    else:
        raise TypeError(f"Scenes is drawn by FluxPipeline and SanaPipeline, not by {type(pipeline).__name__}.")
    call["max_sequence_length"] = pipeline.tokenizer.model_max_length
    if guidance > 1:
        call["negative_prompt"] = ""
    return call
