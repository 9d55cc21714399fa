# SPDX-License-Identifier: Apache-2.0
"""The one call that draws Scenes, for both architectures."""

import pytest
from diffusers import DDPMScheduler, DiffusionPipeline

from diffusers_ternary.evaluation.scenes.call import GUIDANCE, STEPS, scenes_call
from diffusers_ternary.rollouts import Rollouts, check_call, draw_images, prepared
from integration_tests.support.scenes import tiny_teacher


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_it_draws_pictures_that_the_judge_reads(architecture):
    pipeline = tiny_teacher(architecture)
    call = scenes_call(pipeline)
    assert call["num_inference_steps"] == STEPS
    assert check_call(pipeline, call) == call
    rollouts = Rollouts(("a photo of a cat", "two keys"), (1, 2), call, 2)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    with prepared(pipeline):
        images = [image for batch in rollouts.batches() for image in draw_images(pipeline, batch, call)]
    assert [image.size for image in images] == [(64, 64)] * 2
    # Flux calls its transformer for both branches, SANA once for both together.
    assert len(calls) == STEPS * (2 if architecture == "flux" and GUIDANCE > 1 else 1)


def test_without_guidance_there_is_no_second_branch():
    call = scenes_call(tiny_teacher("flux"), steps=2, guidance=1.0)
    assert "negative_prompt" not in call
    assert call["num_inference_steps"] == 2


def test_another_pipeline_is_refused():
    class Other(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(TypeError, match="not by Other"):
        scenes_call(Other(DDPMScheduler()))
