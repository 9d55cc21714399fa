# SPDX-License-Identifier: Apache-2.0
"""The pixel-people pipeline from the package's own data, and the one way in which its scores are measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline

from ..rollouts import Rollouts, draw, prepared


DATA = Path(__file__).with_name("data")

DEMO_CALL: Mapping[str, Any] = MappingProxyType(
    {
        "true_cfg_scale": 1.0,
        "guidance_scale": 0.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 8,
        "max_sequence_length": 24,
    }
)
"""Arguments of ``pipeline(prompt, **DEMO_CALL)``; every published score was measured with them.

No classifier-free guidance: the teacher follows its prompts without, it would double the cost, and it would hide part
of what quantization does to a model.
"""


def demo_folder(variant: str = "teacher") -> str:
    """Folder of the embedded pipeline, for ``from_pretrained`` and the command line.

    Args:
        variant: Which of the embedded pipelines; ``"teacher"`` is the trained one in bfloat16.

    Raises:
        ValueError: If there is no such variant.
    """
    folder = DATA / variant
    if not (folder / "model_index.json").is_file():
        known = sorted(index.parent.name for index in DATA.glob("*/model_index.json"))
        raise ValueError(f"variant={variant!r} is not embedded in this package; choose from {known}.")
    return str(folder)


def demo_pipeline(variant: str = "teacher", torch_dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Load the embedded text-to-image pipeline: 16x16 portraits from prompts of the pixel-people grammar.

    It is a stock ``FluxPipeline``; nothing is downloaded and no custom code is involved.

    Args:
        variant: Which of the embedded pipelines; ``"teacher"`` is the trained one in bfloat16.
        torch_dtype: What the weights are converted to.

    Raises:
        ValueError: If there is no such variant.
    """
    with without_vae_type_warning():
        return FluxPipeline.from_pretrained(demo_folder(variant), dtype=torch_dtype, local_files_only=True)


@contextmanager
def without_vae_type_warning() -> Iterator[None]:
    """FluxPipeline is annotated with AutoencoderKL alone, and warns about AutoencoderTiny, which it supports."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for vae")

    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def generate(
    pipeline: FluxPipeline, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 64, **overrides: Any
) -> np.ndarray:
    """Generate one picture per prompt as every published score was measured: :data:`DEMO_CALL`, a seed per picture.

    Args:
        pipeline: The teacher or a quantized version of it.
        prompts: Prompts of the pixel-people grammar.
        seed: The initial noise of picture ``i`` depends on ``(seed, i)`` alone, so that pipelines can be compared
            picture by picture.
        batch_size: Pictures per call.
        overrides: Arguments that replace those of :data:`DEMO_CALL`, e.g. ``true_cfg_scale=2.0`` for guidance away
            from the empty prompt (or from ``negative_prompt``).

    Returns:
        float32 array [N, 16, 16, 3] in [0, 1].
    """
    call = {**DEMO_CALL, **overrides}
    negative = call.pop("negative_prompt", "" if call["true_cfg_scale"] > 1.0 else None)
    if negative is not None:
        call["negative_prompt"] = negative
    seeds = tuple(range(seed * 1_000_003, seed * 1_000_003 + len(prompts)))
    rollouts = Rollouts(tuple(prompts), seeds, call, batch_size)
    with prepared(pipeline):
        return np.concatenate([draw(pipeline, batch, call, "np").images for batch in rollouts.batches()])
