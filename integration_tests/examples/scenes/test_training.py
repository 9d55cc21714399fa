# SPDX-License-Identifier: Apache-2.0
"""The trainings of Scenes at the size of a test: what comes out is a stock pipeline, and resuming changes nothing."""

import dataclasses
import json
import math
import pickle
import random

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, FluxPipeline, SanaPipeline
from safetensors.torch import load_file

from diffusers_ternary.evaluation.geneval import RELATIONS
from diffusers_ternary.evaluation.scenes.prompts import read_task
from diffusers_ternary.evaluation.scenes.vocabulary import COLORS, PLURALS
from integration_tests.support.scenes import examples, tiny_teacher


components = examples("components")
renderer = examples("renderer")
train_teacher = examples("train_teacher")
train_vae = examples("train_vae")

TINY = train_teacher.Recipe(
    width=64, num_layers=1, num_single_layers=1, steps=4, decay_steps=2, warmup_steps=2, batch_size=2, ema_decay=0.5
)


@pytest.fixture(autouse=True)
def _own_accelerator():
    """accelerate keeps the precision of the first training of a process; other tests train in another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    train_vae.build_vae().save_pretrained(folder)
    return folder


def weights_of(folder):
    """Everything that was trained, as exported and as checkpointed."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors"))
    assert len(files) >= 4
    return {str(file): load_file(folder / file) for file in files}


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_a_resumed_training_ends_with_the_same_bits(architecture, vae_folder, tmp_path):
    recipe = dataclasses.replace(TINY, architecture=architecture)
    train_teacher.train(vae_folder, tmp_path / "whole", recipe, checkpoint_every=4)
    train_teacher.train(vae_folder, tmp_path / "parts", recipe, checkpoint_every=4, stop_at=3)
    assert json.loads((tmp_path / "parts" / "progress.json").read_text())["step"] == 3
    torch.manual_seed(123)  # the state of the process does not matter
    train_teacher.train(vae_folder, tmp_path / "parts", recipe, checkpoint_every=4)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for file, weights in whole.items():
        assert all(torch.equal(weights[name], parts[file][name]) for name in weights), file

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole" / "teacher")
    assert type(pipeline) is (SanaPipeline if architecture == "sana" else FluxPipeline)
    assert pipeline.vae_scale_factor == 4


def test_another_recipe_does_not_resume_but_the_end_may_move(vae_folder, tmp_path):
    recipe = dataclasses.replace(TINY, steps=8)
    train_teacher.train(vae_folder, tmp_path, recipe, checkpoint_every=8, stop_at=1)
    with pytest.raises(ValueError, match="holds a run of another recipe at step 1"):
        train_teacher.train(vae_folder, tmp_path, dataclasses.replace(recipe, learning_rate=1.0), checkpoint_every=8)
    train_teacher.train(vae_folder, tmp_path, dataclasses.replace(recipe, steps=4), checkpoint_every=8, stop_at=3)
    with pytest.raises(ValueError, match="another recipe at step 3"):  # the decay has begun
        train_teacher.train(vae_folder, tmp_path, dataclasses.replace(recipe, steps=9), checkpoint_every=8)


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_training_sees_what_the_pipeline_sees(architecture, vae_folder):
    """The trained module and the pipeline's own denoising step give the same velocity for a prompt."""
    torch.manual_seed(1)
    vae = train_vae.build_vae()
    recipe = dataclasses.replace(TINY, architecture=architecture)
    pipeline, trainee = train_teacher.build(vae, recipe)
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.1)
    latents = torch.randn(1, 4, 16, 16)
    seen = []
    pipeline.transformer.register_forward_hook(lambda *_, **__: seen.append(_[2][0]), with_kwargs=False)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a photo of a cat left of a bus"
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 18}
    if architecture == "flux":
        packed = FluxPipeline._pack_latents(latents, 1, 4, 16, 16)
        pipeline(prompt, latents=packed, guidance_scale=0.0, **call)
    else:
        call |= {"use_resolution_binning": False, "complex_human_instruction": None}
        pipeline(prompt, latents=latents, guidance_scale=1.0, **call)
    velocity = seen[0]
    if architecture == "flux":
        velocity = FluxPipeline._unpack_latents(velocity, 16, 16, vae_scale_factor=1)
    expected = trainee(latents, torch.ones(1), components.token_ids(trainee.tokenizers, [prompt]))
    torch.testing.assert_close(expected, velocity, rtol=1e-4, atol=1e-5)
    assert velocity.std() > 0.01


def test_batches_are_made_in_worker_processes_as_well(vae_folder):
    """A GPU is fed by workers; they get the batches by pickle where processes do not fork."""
    vae = train_vae.build_vae()
    _, trainee = train_teacher.build(vae, TINY)
    batches = train_teacher.Batches(trainee.tokenizers, examples("renderer").Sprites(), TINY, 3, 6)
    restored = pickle.loads(pickle.dumps(batches))
    assert len(restored) == 3
    for name, value in batches[1].items():
        assert torch.equal(restored[1][name], value), name
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_nouns_are_labeled_with_what_the_caption_says_of_them(architecture):
    _, trainee = train_teacher.build(train_vae.build_vae(), dataclasses.replace(TINY, architecture=architecture))
    tokenizer = trainee.tokenizers[-1]
    prompts = {
        "a photo of a red bell and a blue bus": [("bell", "red", None, 1), ("bus", "blue", None, 1)],
        "a dog to the left of two pink keys": [("dog", None, "left of", 1), ("keys", "pink", "right of", 2)],
        "three cacti": [("cacti", None, None, 3)],
    }
    ids = components.token_ids(trainee.tokenizers, list(prompts))[:, -1]
    tasks = [read_task(prompt) for prompt in prompts]
    labels, names = components.noun_labels(ids, tasks, tokenizer)
    for row, said in enumerate(prompts.values()):
        nouns = (labels[row, :, 0] != components.UNNAMED).nonzero().flatten().tolist()
        words = [tokenizer.decode(ids[row, noun]).strip() for noun in nouns]
        assert words == [noun for noun, *_ in said]
        for noun, (_, color, relation, count) in zip(nouns, said, strict=True):
            assert labels[row, noun].tolist() == [
                (*COLORS, None).index(color),
                (*RELATIONS, None).index(relation),
                count,
            ]
        for index, name in enumerate(names[row].tolist()):
            objects = [requirement.name for requirement in tasks[row].include for _ in range(requirement.count)]
            if index < len(objects):
                word = tokenizer.decode(ids[row, name]).strip()
                assert word in (objects[index], PLURALS[objects[index]])
            else:
                assert name == components.UNNAMED
    left_out = components.noun_labels(components.token_ids(trainee.tokenizers, [""])[:, -1], tasks[:1], tokenizer)
    assert all((part == components.UNNAMED).all() for part in left_out)


def test_the_grounding_loss_asks_for_the_noun_of_the_object_that_covers_a_patch():
    lookups = torch.zeros(1, 4, 5)
    lookups[0, 1, 3] = lookups[0, 2, 2] = 9.0
    owners = torch.tensor([[renderer.NOTHING, 0, 1, renderer.NOTHING]])
    right = train_teacher.grounding_loss([lookups], owners, torch.tensor([[3, 2, -100, -100]]))
    wrong = train_teacher.grounding_loss([lookups], owners, torch.tensor([[2, 3, -100, -100]]))
    assert right.item() == pytest.approx(math.log(1 + 4 * math.exp(-9)), rel=1e-3)
    assert wrong.item() == pytest.approx(9.0, rel=1e-3)
    assert train_teacher.grounding_loss([lookups], owners, torch.full((1, 4), components.UNNAMED)) == 0


def test_a_patch_belongs_to_the_object_that_covers_most_of_it():
    sprites = renderer.Sprites()
    tasks = [read_task("a red bell and a blue bus"), read_task("a photo of three keys")]
    layout = renderer.layout_of(tasks, sprites, random.Random(3), training=False)
    drawn = renderer.Renderer(sprites)
    owners, boxes = drawn.owners(layout, 8), renderer.boxes_of(layout, sprites)
    for row, count in enumerate((2, 3)):
        assert set(owners[row].tolist()) == {renderer.NOTHING, *range(count)}
        for patch in (owners[row] != renderer.NOTHING).nonzero().flatten().tolist():
            left, top, right, bottom = boxes[row, owners[row, patch]].tolist()
            assert left < 8 * (patch % 8) + 8
            assert right > 8 * (patch % 8)
            assert top < 8 * (patch // 8) + 8
            assert bottom > 8 * (patch // 8)


def test_the_t5_encoder_starts_with_an_eye_for_neighbors():
    """Softmax of the biases alone: heads that attend the word before, the word after and the two before that."""
    torch.manual_seed(0)
    pipeline, _ = train_teacher.build(train_vae.build_vae(), TINY)
    attention = pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention
    weights = attention.compute_bias(9, 9)[0].softmax(-1)[:3, 4]  # of the fifth word
    for head, places in enumerate(([3], [5], [1, 2])):
        assert weights[head, places].sum() > 0.8


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_every_word_is_one_token(architecture):
    pipeline, _ = train_teacher.build(train_vae.build_vae(), dataclasses.replace(TINY, architecture=architecture))
    rng = random.Random(2)
    special = 2 if architecture == "flux" else 1  # CLIP begins and ends, T5 ends, Gemma begins
    for tag in train_teacher.MIXTURE:
        for _ in range(40):
            prompt = train_teacher.training_task(tag, rng).prompt
            ids = pipeline.tokenizer(prompt).input_ids
            assert len(ids) == len(prompt.split()) + special, prompt
            assert len(ids) <= components.TEXT_LENGTH


@pytest.mark.parametrize("architecture", ["flux", "sana"])
def test_a_teacher_stored_in_float8_is_what_is_stored(architecture, vae_folder, tmp_path):
    recipe = dataclasses.replace(TINY, architecture=architecture, steps=2)
    train_teacher.train(vae_folder, tmp_path, recipe, checkpoint_every=2, float8=True)
    path = tmp_path / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == stored.keys()
    for name, weight in stored.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name].double(), weight.double()), name  # exactly: no value is rounded again
    in_float8 = sum(weight.numel() for weight in stored.values() if weight.dtype == torch.float8_e4m3fn)
    assert in_float8 > 0.9 * sum(weight.numel() for weight in stored.values())
    assert path.stat().st_size < 1.2 * in_float8 + 20_000
    assert all(parameter.dtype == torch.bfloat16 for parameter in pipeline.text_encoder.parameters())


def test_weights_beyond_float8_are_not_stored_in_it(tmp_path):
    pipeline = tiny_teacher()
    pipeline.transformer.x_embedder.weight.data[0, 0] = 500.0
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"x_embedder\.weight .* beyond 448"):
        examples("storage").store_in_float8(tmp_path)
