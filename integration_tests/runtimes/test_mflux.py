# SPDX-License-Identifier: Apache-2.0
"""Exported folders in mflux: its own loader takes every tensor, and its denoisers predict what diffusers' do."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.interop import export_mflux
from integration_tests.support import denoisers


REASON = "mflux is not installed: pip install 'diffusers-ternary[runtimes]', then pip install --no-deps mflux"
mx = pytest.importorskip("mlx.core", reason=REASON)
pytest.importorskip("mflux", reason=REASON)
from mflux.models.common.config.model_config import ModelConfig  # noqa: E402
from mflux.models.common.weights.loading.loaded_weights import LoadedWeights, MetaData  # noqa: E402
from mflux.models.common.weights.loading.weight_applier import WeightApplier  # noqa: E402
from mflux.models.common.weights.loading.weight_definition import ComponentDefinition  # noqa: E402
from mflux.models.common.weights.loading.weight_loader import WeightLoader  # noqa: E402
from mflux.models.flux.model.flux_transformer.transformer import Transformer  # noqa: E402
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer  # noqa: E402
from mflux.models.flux3.model.flux3_transformer.flux3_transformer import Flux3Transformer  # noqa: E402
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer  # noqa: E402
from mflux.models.qwen.weights.qwen_weight_definition import QwenWeightDefinition  # noqa: E402
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402


# Half an image of 64 x 64: tokens of 16 x 16 pixels.
HEIGHT, WIDTH = 32, 64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(tensor: torch.Tensor) -> Any:
    return mx.array(tensor.numpy())


def ids(height: int, width: int) -> torch.Tensor:
    """Positions `[tokens, 4]` of a picture."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)).float()


def settings() -> SimpleNamespace:
    """What the denoisers read of mflux's settings: the first step at t = 0.5."""
    scheduler = SimpleNamespace(sigmas=mx.array([0.5]))
    return SimpleNamespace(
        scheduler=scheduler, num_train_steps=1000, guidance=3.5, precision=mx.float32, height=HEIGHT, width=WIDTH
    )


def run_flux(model: Any, theirs: Any) -> tuple[torch.Tensor, Any]:
    image, text, pooled = noise(1, 8, 64), noise(1, 5, 4096, seed=1), noise(1, 768, seed=2)
    prediction = model(
        hidden_states=image,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=ids(2, 4)[:, :3],
        txt_ids=torch.zeros(5, 3),
    )
    return prediction.sample, theirs(0, settings(), array(image), array(text), array(pooled))


def run_flux2(model: Any, theirs: Any) -> tuple[torch.Tensor, Any]:
    image, text, txt_ids = noise(1, 8, 16), noise(1, 5, 128, seed=1), torch.zeros(5, 4)
    options = {
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.5]),
        "img_ids": ids(2, 4),
        "txt_ids": txt_ids,
    }
    arrays = {name: array(value) for name, value in options.items()}
    return model(image, **options, guidance=None).sample, theirs(array(image), **arrays)


def run_flux3(model: Any, theirs: Any) -> tuple[torch.Tensor, Any]:
    image, text, txt_ids = noise(1, 8, 16), noise(1, 5, 128, seed=1), torch.zeros(5, 4)
    options = {
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.5]),
        "target_timestep": torch.tensor([0.25]),
        "img_ids": ids(2, 4),
        "txt_ids": txt_ids,
    }
    arrays = {name: array(value) for name, value in options.items()}
    return model(image, **options).sample, theirs(array(image), **arrays)


def run_qwen(model: Any, theirs: Any) -> tuple[torch.Tensor, Any]:
    image, text, mask = noise(1, 8, 16), noise(1, 5, 32, seed=1), torch.ones(1, 5, dtype=torch.int64)
    prediction = model(image, text, mask, torch.tensor([0.5]), img_shapes=[[(1, 2, 4)]])
    return prediction.sample, theirs(0, settings(), array(image), array(text), array(mask))


def run_z_image(model: Any, theirs: Any) -> tuple[torch.Tensor, Any]:
    image, text = noise(16, 1, 4, 8), noise(5, 32, seed=1)
    (prediction,) = model([image], torch.tensor([0.5]), [text]).sample
    return prediction, -theirs(array(image), 0.5, mx.array([0.5]), array(text))


# Class → the denoiser of diffusers, that of mflux with the same sizes, and both of their predictions.
RUNS = {
    "FLUX.1": (
        denoisers.flux_of_full_width,
        lambda: Transformer(ModelConfig.dev(), num_transformer_blocks=1, num_single_transformer_blocks=1),
        run_flux,
    ),
    "FLUX.2": (
        denoisers.flux2,
        lambda: Flux2Transformer(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=128,
            timestep_guidance_channels=32,
            axes_dims_rope=(16, 16, 16, 16),
        ),
        run_flux2,
    ),
    "FLUX.3": (
        denoisers.flux3,
        lambda: Flux3Transformer(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=128,
            timestep_channels=32,
            axes_dims_rope=(16, 16, 16, 16),
        ),
        run_flux3,
    ),
    "Z-Image": (
        functools.partial(denoisers.z_image, 6, (16, 24, 24)),
        lambda: ZImageTransformer(
            dim=384, n_layers=2, n_refiner_layers=1, n_heads=6, cap_feat_dim=32, axes_dims=[16, 24, 24]
        ),
        run_z_image,
    ),
    "Qwen-Image": (
        functools.partial(denoisers.qwen_image, 2, (16, 56, 56)),
        lambda: QwenTransformer(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=128,
            num_attention_heads=2,
            joint_attention_dim=32,
        ),
        run_qwen,
    ),
}


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_predictions_are_those_of_diffusers(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(ModelConfig, "precision", mx.float32)
    make, make_theirs, run = RUNS[name]
    torch.manual_seed(0)
    model = quantize(make(), TernaryConfig(group_size=64, scale_layout="group"))
    model.save_pretrained(tmp_path / "in")
    model.dequantize()
    report = export_mflux(tmp_path / "in", tmp_path / "out")
    assert report.differing == 0
    theirs = make_theirs()
    weights, level, version = WeightLoader._try_load_mflux_format(tmp_path / "out")
    WeightApplier.apply_and_quantize_single(
        LoadedWeights({"transformer": weights}, MetaData(level, version)),
        theirs,
        ComponentDefinition(name="transformer", hf_subdir="transformer"),
        quantize_arg=None,
        # The most particular of them all.
        quantization_predicate=QwenWeightDefinition.quantization_predicate,
    )
    assert dict(tree_flatten(theirs.parameters())).keys() == dict(tree_flatten(weights)).keys()
    expected, found = run(model, theirs)
    found = torch.from_numpy(np.array(found)).reshape(expected.shape)
    assert expected.std() > 1e-2
    assert float((found - expected).abs().max()) < 1e-3
