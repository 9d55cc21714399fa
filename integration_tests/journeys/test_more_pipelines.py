# SPDX-License-Identifier: Apache-2.0
"""Conditioned pipelines, two denoisers, ControlNets, video: quantized on the fly, run, saved, loaded, run again."""

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from integration_tests.support.more_pipelines import MORE_PIPELINES
from integration_tests.support.pipelines import PIPELINES


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MORE_PIPELINES)
def test_the_same_latents_from_the_saved_pipeline(name, tmp_path):
    MORE_PIPELINES[name].build().save_pretrained(tmp_path / "float")
    expected = MORE_PIPELINES[name].draw(DiffusionPipeline.from_pretrained(tmp_path / "float"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=TernaryConfig())
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            assert bool(packed_layers(module)) == (component in MORE_PIPELINES[name].denoisers), component
    latents = MORE_PIPELINES[name].draw(pipeline)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, expected), "nothing was rounded"
    pipeline.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert torch.equal(MORE_PIPELINES[name].draw(again), latents)


def test_controlnets_are_quantized_by_name(tmp_path):
    name = "stable_diffusion_controlnet"
    MORE_PIPELINES[name].build().save_pretrained(tmp_path)
    config = TernaryConfig(components=["unet", "controlnet"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert packed_layers(pipeline.unet)
    assert packed_layers(pipeline.controlnet)
    assert torch.isfinite(MORE_PIPELINES[name].draw(pipeline)).all()


def test_modular_pipelines(tmp_path):
    """Components are named in `load_components`, and the blocks then run what was loaded."""
    PIPELINES["sdxl"].build().save_pretrained(tmp_path)
    pipeline = ModularPipeline.from_pretrained(str(tmp_path))
    pipeline.load_components(quantization_config={"unet": TernaryConfig()})
    assert packed_layers(pipeline.unet)
    assert not packed_layers(pipeline.vae)
    latents = pipeline(
        prompt="a red cat", height=16, width=16, num_inference_steps=2, output_type="latent", output="latents"
    )
    assert torch.isfinite(latents).all()


def test_one_config_for_all_components_of_a_modular_pipeline(tmp_path):
    """As in other pipelines: the denoiser is quantized, everything else is loaded as it is."""
    PIPELINES["sdxl"].build().save_pretrained(tmp_path)
    pipeline = ModularPipeline.from_pretrained(str(tmp_path))
    pipeline.load_components(quantization_config=TernaryConfig())
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {name for name, part in models.items() if packed_layers(part)} == {"unet"}
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} <= models.keys()
    pipeline.to(torch.bfloat16)
    assert {part.dtype for part in models.values()} == {torch.bfloat16}
    chosen = ModularPipeline.from_pretrained(str(tmp_path))
    chosen.load_components(quantization_config=TernaryConfig(components={"unet": "ternary", "vae": "int8"}))
    assert packed_layers(chosen.unet)
    assert packed_layers(chosen.vae)
    assert not packed_layers(chosen.text_encoder)


def test_a_modular_pipeline_in_memory(tmp_path):
    PIPELINES["sdxl"].build().save_pretrained(tmp_path)
    pipeline = ModularPipeline.from_pretrained(str(tmp_path))
    pipeline.load_components()
    assert quantize(pipeline) is pipeline
    assert packed_layers(pipeline.unet)
    assert not packed_layers(pipeline.vae)
