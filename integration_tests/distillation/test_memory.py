# SPDX-License-Identifier: Apache-2.0
"""The memory estimate, on the shapes of the real models, and against what a backward pass really keeps."""

import dataclasses
import os

import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.distillation.config import MODES, DistillConfig
from diffusers_ternary.distillation.memory import (
    available_memory,
    check_memory,
    estimate_memory,
    forward_activations,
    observed_tokens,
)
from diffusers_ternary.distillation.trainable import LayerTraining, TrainableTernaryLayer
from diffusers_ternary.distillation.trainee import make_trainee, ternary_layers
from integration_tests.support import denoisers
from integration_tests.support.pipelines import PIPELINES


GB = 1e9
TOKENS = {"flux": 4096 + 512, "sana": 1024 + 300}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """FLUX.1-dev and SANA 1.6B as they are published, without their weights."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        sana = SanaTransformer2DModel(
            num_layers=20,
            num_attention_heads=70,
            attention_head_dim=32,
            num_cross_attention_heads=20,
            cross_attention_head_dim=112,
            cross_attention_dim=2240,
            caption_channels=2304,
        )
    return {"flux": flux, "sana": sana}


def estimate(models, name, mode="full", *, dtype=torch.bfloat16, eight_bit=True, shards=1, **options):
    config = DistillConfig(**{"mode": mode, "batch_size": 1, **options})
    return estimate_memory(
        models[name],
        TernaryConfig(),
        config,
        tokens=TOKENS[name],
        dtype=dtype,
        eight_bit_optimizer=eight_bit,
        shards=shards,
    )


@pytest.mark.parametrize(("name", "teacher", "latents"), [("sana", 3.2, 13), ("flux", 23.8, 95)])
def test_full_training_of_the_real_models(models, name, teacher, latents):
    """8 bytes a parameter for latents and their gradients, 2 for the teacher; the moments come on top."""
    found = estimate(models, name)
    assert found.teacher / GB == pytest.approx(teacher, rel=0.01)
    assert (found.trained + found.gradients) / GB == pytest.approx(latents, rel=0.06)
    assert found.optimizer * 2 == pytest.approx(found.trained, rel=0.01)
    assert estimate(models, name, eight_bit=False).optimizer == 4 * found.optimizer


def test_a_low_rank_correction_of_flux_fits_where_it_was_published_to(models):
    """Rank 64 on frozen codes took 43 GB on a GPU of 80."""
    assert estimate(models, "flux", "lora", rank=64, eight_bit=False).total / GB == pytest.approx(43, rel=0.15)


@pytest.mark.parametrize("name", TOKENS)
def test_the_modes_are_in_order(models, name):
    totals = {mode: estimate(models, name, mode).total for mode in MODES}
    assert totals["full"] > 2 * totals["lora"]
    assert totals["full"] > 2 * totals["blockwise"]
    scales = estimate(models, name, "scales", train_other="none")
    assert scales.trained < 0.04 * estimate(models, name).trained, "4 bytes for each group of 128"
    assert estimate(models, name, "scales", train_scales=False, train_other="none").trained == 0


@pytest.mark.parametrize("name", TOKENS)
def test_options_that_lower_the_need(models, name):
    for option, more, less in (
        ("gradient_checkpointing", False, True),
        ("batch_size", 8, 1),
        ("block_weight", 0.5, 0.0),
        ("train_other", "all", "none"),
    ):
        assert estimate(models, name, **{option: more}).total > estimate(models, name, **{option: less}).total, option
    sharded = estimate(models, name, shards=4)
    assert sharded.trained == pytest.approx(estimate(models, name).trained / 4, abs=1)


def test_refused_with_advice(models):
    config = DistillConfig(mode="full", batch_size=8)
    with pytest.raises(MemoryError) as raised:
        check(models, config, 80 * GB)
    message = str(raised.value)
    assert message.startswith("mode='full': ")
    assert "80.0 GB are there" in message
    assert "mode='blockwise', gradient_checkpointing=True" in message
    assert "mode='full', gradient" not in message
    with pytest.raises(MemoryError, match="No mode fits"):
        check(models, config, 8 * GB)
    advised = dataclasses.replace(config, mode="blockwise", gradient_checkpointing=True)
    assert check(models, advised, 80 * GB).mode == "blockwise"


def check(models, config, available):
    return check_memory(
        models["flux"],
        TernaryConfig(),
        config,
        tokens=TOKENS["flux"],
        available=int(available),
        dtype=torch.bfloat16,
        eight_bit_optimizer=True,
    )


@pytest.mark.parametrize("mode", ["full", "scales", "lora"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_parameters_are_those_of_the_trainee(name, mode):
    """Counted on the real thing: all that takes a gradient, and the student that is stored."""
    teacher = getattr(denoisers, name)()
    config = DistillConfig(mode=mode, rank=4, train_other="none")
    student = quantize(getattr(denoisers, name)(), TernaryConfig())
    training = LayerTraining(latents=mode == "full", low_rank=mode == "lora", rank=4 if mode == "lora" else 0)
    trainee = make_trainee(student, teacher, dict.fromkeys(ternary_layers(student), training))
    layers = [module for module in trainee.modules() if isinstance(module, TrainableTernaryLayer)]
    trained = [p for layer in layers for n, p in layer.named_parameters() if n != "bias" and p.requires_grad]
    found = estimate_memory(teacher, TernaryConfig(), config, tokens=16)
    assert found.trained == 4 * sum(p.numel() for p in trained)
    assert found.teacher == 4 * sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_kept_for_the_backward_pass(dtype, latents):
    """What autograd saves beside the parameters: the dequantized weight, and frozen codes."""
    linear = nn.Linear(1024, 512, dtype=dtype)
    weight = linear.weight.detach().clone()
    packed = quantize(nn.Sequential(linear), TernaryConfig(overrides={"*": "ternary"}))[0]
    layer = TrainableTernaryLayer(packed, weight, LayerTraining(latents=latents))
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = layer(torch.randn(1, 1024, dtype=dtype, requires_grad=True))
    expected = (dtype.itemsize + (not latents)) * weight.numel()
    assert sum(saved.values()) == pytest.approx(expected, rel=0.1)
    assert result.requires_grad


def test_what_is_free_counts_the_teacher():
    teacher = nn.Linear(64, 64)
    free = available_memory(torch.device("cpu"), teacher)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 4 * 64 * 65 < free <= installed + 4 * 64 * 65


@pytest.mark.parametrize(("name", "tokens"), [("flux", 16 + 16), ("sd3", 64 + 93), ("sana", 256), ("sdxl", 77)])
def test_tokens_are_measured(name, tokens):
    """Image and text in one sequence (FLUX: 16 packed tokens and 16 of text), or the longer of the two."""
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    denoiser = getattr(pipeline, tiny.denoiser)
    with observed_tokens(denoiser) as observed:
        pipeline("a cat", height=tiny.size, width=tiny.size, num_inference_steps=1, output_type="latent", **tiny.call)
    assert 0.5 * tokens <= observed[0] <= tokens
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def test_a_unet_recomputes_less_than_a_block():
    """A level of a UNet holds many transformer blocks, and each is checkpointed on its own."""
    unet = PIPELINES["sdxl"].build().unet
    settings = {"tokens": 64, "dtype": torch.bfloat16}
    one = forward_activations(unet, TernaryConfig(), **settings)
    scales = DistillConfig(mode="scales", batch_size=1, gradient_checkpointing=True, block_weight=0.0)
    blocks = dataclasses.replace(scales, mode="blockwise")
    level = estimate_memory(unet, TernaryConfig(), blocks, **settings).activations
    assert one < estimate_memory(unet, TernaryConfig(), scales, **settings).activations
    assert one < level
