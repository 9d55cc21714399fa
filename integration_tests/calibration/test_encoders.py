# SPDX-License-Identifier: Apache-2.0
"""Text encoders are calibrated on what they see and measured by what the denoiser is given, without denoising."""

import dataclasses

import pytest
import torch

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.calibration import CalibrationConfig, SensitivityConfig, SolverConfig, calibrate
from diffusers_ternary.calibration.encoders import EncoderRollouts, EncoderStates, rollouts_for
from diffusers_ternary.rollouts import Rollouts, make_rollouts, prepared
from integration_tests.support.pipelines import PIPELINES


PROMPTS = ["a red cat", "a blue dog"]
FAST = SolverConfig(descent_passes=1, starts=1)
BARE = SensitivityConfig(prompts=1, steps=1, group_sizes=(), ranks=(), int8=False)
ENCODERS = {"flux": "text_encoder_2", "sana": "text_encoder", "qwen_image": "text_encoder"}  # T5, Gemma, Qwen


def build(name):
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2}
    return pipeline, call


def rollouts(pipeline, call, prompts=PROMPTS, seed=0):
    return rollouts_for("text_encoder", make_rollouts(pipeline, prompts, seed=seed, batch_size=1, call_kwargs=call))


def test_denoisers_keep_their_trajectories():
    plain = Rollouts(("a",), (0,))
    assert rollouts_for("transformer", plain) is plain
    assert rollouts_for("text_encoder_2", plain) == EncoderRollouts(("a",), (0,))
    assert isinstance(rollouts_for("text_encoder_2", plain).first(1), EncoderRollouts)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_solved_without_one_denoising_step(name):
    pipeline, call = build(name)
    component, config = ENCODERS[name], TernaryConfig(group_size=16, components=[ENCODERS[name]])
    steps, denoiser = [], pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: steps.append(1) or denoiser(*args, **kwargs)
    settings = CalibrationConfig(call_kwargs=call, solver=FAST, sensitivity=BARE)
    report = calibrate(pipeline, PROMPTS, config, settings).ternary_report
    assert steps == []
    assert {layer.name.split(".")[0] for layer in report.layers} == {component}
    # Qwen reads pictures too, which no prompt shows to it.
    assert all(layer.tokens > 0 for layer in report.layers if ".visual." not in layer.name)
    assert len(packed_layers(pipeline.components[component])) == len(report.layers)
    # Less than rounding leaves, on the inputs that the prompts gave.
    assert sum(layer.error for layer in report.layers) < sum(layer.error_rounded for layer in report.layers)
    assert report.velocity_nmse[component] > 0
    pipeline.transformer.forward = denoiser
    images = pipeline("a red cat", output_type="latent", **call).images
    assert torch.isfinite(images).all()


def test_the_error_is_that_of_the_embeddings():
    """Against `encode_prompt`, which the denoiser's inputs come from."""
    pipeline, call = build("flux")
    with torch.no_grad():
        tokens = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=call["max_sequence_length"])[0]
        with prepared(pipeline):
            states = EncoderStates.record("", pipeline, rollouts(pipeline, call))
            assert states.error(pipeline.text_encoder_2) == 0.0
        for parameter in pipeline.text_encoder_2.parameters():
            parameter.mul_(1.02)
        changed = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=call["max_sequence_length"])[0]
        with prepared(pipeline):
            found = states.error(pipeline.text_encoder_2)
    expected = (changed - tokens).double().square().sum() / tokens.double().square().sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_budget_for_an_encoder():
    pipeline, call = build("flux")
    measure = dataclasses.replace(BARE, int8=True)
    settings = CalibrationConfig(call_kwargs=call, solver=FAST, sensitivity=measure, size_budget="6 bits")
    config = TernaryConfig(group_size=16, components=["text_encoder_2"])
    report = calibrate(pipeline, PROMPTS, config, settings).ternary_report
    assert report.bits_per_weight <= 6
    assert {"g16", "int8"} <= {row.chosen for row in report.sensitivity}
    for row in report.sensitivity:
        assert 0 == row.nmse["keep"] < row.nmse["int8"] < row.nmse["g16"]


def test_an_encoder_that_overflows_is_named_before_anything_is_measured():
    pipeline, call = build("flux")
    with torch.no_grad():
        pipeline.text_encoder_2.encoder.final_layer_norm.weight.fill_(float("inf"))
    with prepared(pipeline), pytest.raises(ValueError, match="FluxPipeline: the denoiser is given NaN or Inf"):
        EncoderStates.record("", pipeline, rollouts(pipeline, call))
