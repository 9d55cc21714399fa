# SPDX-License-Identifier: Apache-2.0
"""PSNR, SSIM and CLIP score against their formulas, computed by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ternary.evaluation import ClipScore, MissingExtraError
from diffusers_ternary.evaluation.metrics import SSIM_WINDOW, image_distance
from integration_tests.support.evaluate_pipelines import clip_text_config, clip_tokenizer


TOLERANCE = 1e-5  # dB and SSIM: torchmetrics accumulates and takes logarithms in float32


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def noisy(rng: np.random.Generator, image: np.ndarray, amplitude: int) -> np.ndarray:
    noise = rng.integers(-amplitude, amplitude + 1, image.shape)
    return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


def psnr_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2))


def ssim_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, around every pixel of the mirrored image."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    margin = SSIM_WINDOW // 2
    first, second = (
        np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect") for image in (first, second)
    )
    values = []
    for channel in range(3):
        x, y = (image[..., channel].astype(float) / 255 for image in (first, second))
        for row in range(x.shape[0] - SSIM_WINDOW + 1):
            for column in range(x.shape[1] - SSIM_WINDOW + 1):
                part = np.s_[row : row + SSIM_WINDOW, column : column + SSIM_WINDOW]
                a, b = x[part], y[part]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = (window * a * a).sum() - mean_a**2
                var_b = (window * b * b).sum() - mean_b**2
                covariance = (window * a * b).sum() - mean_a * mean_b
                values.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return float(np.mean(values))


def test_one_gray_level_everywhere_is_48_13_db() -> None:
    dark, light = (Image.new("RGB", (16, 16), (value,) * 3) for value in (100, 101))
    assert image_distance([dark], [light]).psnr_db == pytest.approx(20 * math.log10(255), abs=TOLERANCE)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(16, 16), (13, 20)])
def test_psnr_and_ssim_match_their_formulas(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    teacher = [random_image(rng, *shape) for _ in range(3)]
    student = [noisy(rng, image, amplitude) for image, amplitude in zip(teacher, (4, 30, 120), strict=True)]
    result = image_distance(*([Image.fromarray(image) for image in images] for images in (student, teacher)))
    pairs = list(zip(student, teacher, strict=True))
    assert result.psnr_db == pytest.approx(psnr_by_hand(np.stack(student), np.stack(teacher)), abs=TOLERANCE)
    assert result.psnr_per_image == pytest.approx([psnr_by_hand(*pair) for pair in pairs], abs=TOLERANCE)
    assert result.ssim == pytest.approx(np.mean([ssim_by_hand(*pair) for pair in pairs]), abs=TOLERANCE)


def test_one_identical_pair_does_not_make_the_whole_infinite() -> None:
    rng = np.random.default_rng(0)
    first, second = (random_image(rng, 16, 16) for _ in range(2))
    changed = noisy(rng, second, 20)
    result = image_distance(
        [Image.fromarray(first), Image.fromarray(changed)], [Image.fromarray(first), Image.fromarray(second)]
    )
    assert math.isinf(result.psnr_per_image[0])
    assert result.psnr_db == pytest.approx(psnr_by_hand(changed, second) + 10 * math.log10(2), abs=TOLERANCE)


def test_what_small_images_do_not_allow_is_named() -> None:
    image = Image.new("RGB", (8, 8))
    result = image_distance([image], [image])
    assert result.ssim is None
    assert result.lpips is None
    assert "8 pixels" in result.unavailable["ssim"]
    assert set(result.unavailable) == {"ssim", "lpips"}


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="16x8 pixels, the teacher of 16x16"):
        image_distance([Image.new("RGB", (16, 8))], [Image.new("RGB", (16, 16))])


def test_clip_score_is_the_cosine_of_the_embeddings(tmp_path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=clip_text_config(tokenizer).to_dict(),
        vision_config={**vision, "num_attention_heads": 2},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(random_image(rng, 16, 16)) for _ in range(3)]
    prompts = ["a dog", "red", "a house that is far too long for the text model of this test"]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            vision_out = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            text_out = model.text_projection(model.text_model(**tokens).pooler_output)
        expected.append(max(0.0, 100 * torch.cosine_similarity(vision_out, text_out).item()))
    assert sum(expected) > 0
    assert ClipScore(tmp_path, batch_size=2)(images, prompts) == pytest.approx(np.mean(expected), rel=1e-4)


def test_clip_checkpoint_must_be_local(tmp_path) -> None:
    with pytest.raises(ValueError, match="not a local CLIP checkpoint"):
        ClipScore(tmp_path)


def test_without_torchmetrics_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    image = Image.new("RGB", (16, 16))
    with pytest.raises(MissingExtraError, match=r"Comparing pictures .*pip install diffusers-ternary\[evaluate\]"):
        image_distance([image], [image])
