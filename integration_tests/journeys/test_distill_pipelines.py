# SPDX-License-Identifier: Apache-2.0
"""Stock pipelines of every family are distilled: inputs, noise, guidance branches and blocks are theirs."""

import pytest
import torch

from diffusers_ternary import TernaryConfig
from diffusers_ternary.distillation import DistillConfig, DistillReport, distill
from integration_tests.support.pipelines import PIPELINES


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_pipeline_is_distilled(name, tmp_path):
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    settings = DistillConfig(
        mode="full",
        updates=6,
        batch_size=2,
        held_out=2,
        evaluate_every=3,
        calibration=None,
        call_kwargs={"num_inference_steps": 5, "height": tiny.size, "width": tiny.size, **tiny.call},
    )
    prompts = ["a red cat", "a blue cat", "a green cup", "a red cup", "a dog", "a tree"]
    config = TernaryConfig(group_size=32, activation_dtype="none")
    student = distill(pipeline, prompts, config, settings, tmp_path, progress=False)
    report = DistillReport.load_json(tmp_path / "distill.json")
    assert report.stopped is None
    assert report.best_error < report.start_error
    assert student.components[tiny.denoiser].is_quantized
    latents = student(
        "a cat", output_type="latent", generator=torch.Generator().manual_seed(0), **settings.call_kwargs
    )
    assert torch.isfinite(torch.as_tensor(latents[0])).all()
