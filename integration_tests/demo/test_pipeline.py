# SPDX-License-Identifier: Apache-2.0
"""The embedded teacher: stock classes, the right size, and pictures that show what the prompt says."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTokenizer, T5Tokenizer

from diffusers_ternary.demo import DEMO_CALL, attribute_accuracy, demo_pipeline, generate, held_out_prompts
from diffusers_ternary.demo.grammar import training_prompts
from diffusers_ternary.demo.pipeline import DATA


@pytest.fixture(scope="module")
def teacher() -> FluxPipeline:
    pipeline = demo_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_teacher_draws_what_held_out_prompts_ask_for(teacher: FluxPipeline) -> None:
    prompts = held_out_prompts(64, 100)
    score = attribute_accuracy(generate(teacher, prompts, seed=100), prompts)
    assert score.mean >= 0.98, score
    assert score.all_attributes >= 0.90, score


def test_the_pipeline_is_stock_and_loads_without_the_package_and_without_tokenizer_warnings() -> None:
    code = (
        "import sys; from diffusers import FluxPipeline\n"
        f"pipeline = FluxPipeline.from_pretrained({str(DATA / 'teacher')!r}, local_files_only=True)\n"
        "assert type(pipeline) is FluxPipeline and 'diffusers_ternary' not in sys.modules\n"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    # asserting on names rather than on an empty stream: progress bars and an import of torchvision are not ours
    for unwanted in ("okenizer", "block_out_channels", "were not used", "newly initialized"):
        assert unwanted not in fresh.stderr, fresh.stderr


def test_demo_pipeline_logs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("diffusers")
    library.addHandler(caplog.handler)  # diffusers does not propagate to the root logger
    try:
        pipeline = demo_pipeline(torch_dtype=torch.bfloat16)
    finally:
        library.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text
    assert pipeline.transformer.dtype == torch.bfloat16


def test_the_package_data_are_small() -> None:
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 10_000_000
    assert (DATA / "judge.safetensors").stat().st_size <= 2_000_000


def test_the_inner_width_suits_groups_of_128(teacher: FluxPipeline) -> None:
    assert teacher.transformer.inner_dim % 128 == 0
    blocks = [*teacher.transformer.transformer_blocks, *teacher.transformer.single_transformer_blocks]
    widths = {m.in_features for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)}
    assert widths
    assert all(width % 128 == 0 for width in widths)


def test_the_vae_is_the_identity(teacher: FluxPipeline) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = teacher.vae.encode(pixels).latents
        decoded = teacher.vae.decode(latents).sample
    torch.testing.assert_close(latents * teacher.vae.config.scaling_factor, pixels, atol=1e-6, rtol=0)
    torch.testing.assert_close(decoded, pixels, atol=2e-5, rtol=0)


def test_every_word_of_the_grammar_is_one_token_and_prompts_are_never_cut(teacher: FluxPipeline) -> None:
    assert type(teacher.tokenizer) is CLIPTokenizer
    assert type(teacher.tokenizer_2) is T5Tokenizer
    for prompt in [*training_prompts(200, 0), *held_out_prompts(200, 0)]:
        pieces = len(prompt.replace(",", " ,").split())
        clip_ids, t5_ids = teacher.tokenizer(prompt).input_ids, teacher.tokenizer_2(prompt).input_ids
        assert len(clip_ids) == pieces + 2 <= teacher.tokenizer.model_max_length
        assert len(t5_ids) == pieces + 1 <= DEMO_CALL["max_sequence_length"]
        assert teacher.tokenizer_2.unk_token_id not in t5_ids


def test_a_word_outside_the_vocabulary_is_spelled_and_does_not_end_the_prompt(teacher: FluxPipeline) -> None:
    ids = teacher.tokenizer("zebra x tan skin").input_ids
    assert ids.count(teacher.tokenizer.eos_token_id) == 1


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(teacher: FluxPipeline) -> None:
    prompts = held_out_prompts(4, 0)
    options = {"num_inference_steps": 3}
    together = generate(teacher, prompts, seed=5, **options)
    in_pairs = generate(teacher, prompts, seed=5, batch_size=2, **options)
    other = generate(teacher, prompts, seed=6, **options)
    np.testing.assert_allclose(together, in_pairs, atol=1e-4)
    assert np.abs(together - other).max() > 0.1


def test_demo_call_serves_a_single_prompt_as_the_readme_writes_it(teacher: FluxPipeline) -> None:
    prompt = held_out_prompts(1, 0)[0]
    noise = torch.Generator().manual_seed(0)
    image = teacher(prompt, generator=noise, **DEMO_CALL).images[0]
    assert image.size == (16, 16)
    expected = generate(teacher, [prompt], seed=0)[0]
    np.testing.assert_allclose(np.asarray(image) / 255.0, expected, atol=1 / 255)


def test_guidance_away_from_the_empty_prompt_works_in_batches(teacher: FluxPipeline) -> None:
    prompts = held_out_prompts(3, 0)
    guided = generate(teacher, prompts, true_cfg_scale=2.0, num_inference_steps=3)
    plain = generate(teacher, prompts, num_inference_steps=3)
    assert guided.shape == plain.shape == (3, 16, 16, 3)
    assert np.abs(guided - plain).max() > 0.01


def test_demo_call_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        DEMO_CALL["height"] = 32  # type: ignore[index]


def test_an_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"variant='nobody'.*teacher"):
        demo_pipeline("nobody")


def test_model_index_names_library_classes_only() -> None:
    index = json.loads(Path(DATA / "teacher" / "model_index.json").read_text())
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    assert libraries <= {"diffusers", "transformers", None}


def test_dropout_does_not_reach_the_pictures() -> None:
    pipeline = demo_pipeline()
    before = generate(pipeline, held_out_prompts(2, 1), seed=3)
    pipeline.text_encoder_2.train()
    dropouts = [part for part in pipeline.text_encoder_2.modules() if isinstance(part, torch.nn.Dropout)]
    for part in dropouts:
        part.p = 0.5
    assert dropouts
    np.testing.assert_array_equal(generate(pipeline, held_out_prompts(2, 1), seed=3), before)
    assert pipeline.text_encoder_2.training
