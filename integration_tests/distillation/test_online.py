# SPDX-License-Identifier: Apache-2.0
"""The pool of trajectories: rows of the real pipeline, one step at a time, and the same bits after a resume."""

import io
import shutil
import threading

import pytest
import torch

from diffusers_ternary.distillation.cache import TeacherCache
from diffusers_ternary.distillation.online import TeacherPool, load_pool, save_pool
from diffusers_ternary.rollouts import recorded_calls
from integration_tests.distillation.test_cache import call_kwargs, recorder
from integration_tests.support import distillation as tiny
from integration_tests.support.pipelines import PIPELINES, quiet


PROMPTS = ["a red cat", "a blue dog", "a house", "two trees", "a cup"]
STEPS = 3


def pool(name="flux", pipeline=None, size=4, **options) -> TeacherPool:
    return TeacherPool(recorder(name, pipeline, PROMPTS, **{"seed": 7, **options}), size)


def take(source: TeacherPool, count: int, seed: int = 0) -> list[torch.Tensor]:
    """All tensors of a number of batches."""
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    for _ in range(count):
        batch = source.batch(torch.randint(len(source), (3,), generator=generator).tolist(), generator)
        found += [batch.sample, *batch.rollout]
        found += [value for value in batch.conditioning.values() if isinstance(value, torch.Tensor)]
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["flux", "sd3", "sana", "z_image", "sdxl"])
def test_rows_are_those_of_a_cache(name, tmp_path):
    """The first round of prompts, drawn with the same noise and in the same batches, is what a cache would hold."""
    source = pool(name)
    batch = source.batch(range(4), torch.Generator().manual_seed(0))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(7)).tolist()
    cache = TeacherCache.build(recorder(name, prompts=[PROMPTS[i] for i in order], seed=7), tmp_path)
    expected = cache.batch(range(4), torch.Generator().manual_seed(0))
    assert torch.equal(batch.sample, expected.sample)
    assert all(torch.equal(a, b) for a, b in zip(batch.rollout, expected.rollout, strict=True))
    assert batch.conditioning.keys() == expected.conditioning.keys()
    assert (batch.null_conditioning is None) == (expected.null_conditioning is None)
    source.close()


def test_each_batch_is_one_step_of_the_teacher():
    pipeline = PIPELINES["flux"].build()
    source = pool(pipeline=pipeline)
    calls = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: calls.append(threading.get_ident()))
    source.batch([0])
    per_batch = []
    for _ in range(2 * STEPS):
        before = len(calls)
        source.batch([0])
        per_batch.append(len(calls) - before)
    assert per_batch == [1] * (2 * STEPS)
    handle.remove()
    source.close()


def test_old_rows_are_replaced_and_noise_is_new():
    source = pool(size=2, batch_size=1)
    samples = torch.cat([source.batch([0, 1]).sample for _ in range(5 * STEPS)])
    assert len(torch.unique(samples.flatten(1), dim=0)) >= 5
    source.close()


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_a_resumed_pool_goes_on_with_the_same_bits(taken):
    first = pool()
    take(first, taken)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    expected = take(first, 7, seed=3)
    buffer.seek(0)
    second = pool()
    take(second, 2)  # whatever it did before
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(take(second, 7, seed=3), expected)
    first.close()
    second.close()


def test_training_beside_it_changes_nothing():
    """The trainer calls the same denoiser and steps the same scheduler between two batches."""
    alone = pool()
    expected = take(alone, 6)
    pipeline = PIPELINES["flux"].build()
    beside, found = pool(pipeline=pipeline), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        indices = torch.randint(4, (3,), generator=generator).tolist()
        batch = beside.batch(indices, generator)
        found += [batch.sample, *batch.rollout]
        found += [value for value in batch.conditioning.values() if isinstance(value, torch.Tensor)]
        with recorded_calls(pipeline.transformer) as calls, torch.enable_grad():
            state, timestep = batch.rollout
            pipeline.transformer(hidden_states=state, timestep=timestep, **batch.conditioning)
        assert len(calls) == 1
        quiet(pipeline)(
            "a dog", height=16, width=16, num_inference_steps=2, output_type="latent", max_sequence_length=16
        )
    assert same(found, expected)
    alone.close()
    beside.close()


def test_closing_ends_the_thread():
    source = pool()
    source.batch([0])
    thread = source._call._thread
    assert thread.is_alive()
    source.close()
    assert not thread.is_alive()
    assert not source._recorder.denoiser._forward_hooks
    assert len(take(source, STEPS)) > 0, "a later batch starts the trajectory again"
    source.close()


def test_errors_of_the_pipeline_reach_the_caller():
    def interrupt(pipeline, step, timestep, tensors):
        raise RuntimeError("stop here")

    call = call_kwargs("flux", callback_on_step_end=interrupt)
    source = TeacherPool(recorder(prompts=PROMPTS, call_kwargs=call, batch_size=1), size=1)
    with pytest.raises(RuntimeError, match="stop here"):
        source.batch([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 5}, "size=5 is not a multiple of batch_size=2"),
        ({"rollout_states": -1}, "rollout_states=-1"),
        ({"component": "unet"}, "has no unet"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        pool(**options)


def test_bad_rows_and_states():
    source = pool()
    with pytest.raises(IndexError, match="not between 0 and 3"):
        source.batch([4])
    state = source.state_dict()
    with pytest.raises(ValueError, match="seed=8; this one has 7"):
        source.load_state_dict({**state, "seed": 8})
    with pytest.raises(ValueError, match="prompts_sha256="):
        source.load_state_dict({**state, "prompts_sha256": "0"})


def test_stored_states_that_change_are_noticed(tmp_path):
    source = pool()
    take(source, 3)
    for step in (2, 4, 6):
        save_pool(source, tmp_path, step, 0)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"pool-0000000{step}-process-0.safetensors" for step in (4, 6)]
    expected = take(source, 3)
    source.close()
    resumed = pool()
    load_pool(resumed, tmp_path, 6, 0)
    assert same(take(resumed, 3), expected)
    resumed.close()
    shutil.copy(files[0], files[1])
    with pytest.raises(ValueError, match=r"is of another step\. The run cannot go on"):
        load_pool(pool(), tmp_path, 6, 0)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(ValueError, match=r"is not as it was written\. The run cannot go on"):
        load_pool(pool(), tmp_path, 4, 0)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    """Stopped at a call of the teacher's denoiser in the fourth update, after the checkpoint of the second."""
    settings = {"online_pool": 4, "checkpoint_every": 2}
    whole = tiny.run(tmp_path / "whole", **settings)
    pipeline, calls = tiny.teacher(), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 73:
            raise KeyboardInterrupt

    pipeline.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "stopped", pipeline=pipeline, **settings)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "pool-00000002-process-0.safetensors",
        "step-00000002",
    ]
    assert not (tmp_path / "stopped" / "cache" / "training").exists()
    state = (checkpoints / "pool-00000002-process-0.safetensors").read_bytes()
    (checkpoints / "pool-00000002-process-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing, so the run cannot go on"):
        tiny.run(tmp_path / "stopped", **settings)
    (checkpoints / "pool-00000002-process-0.safetensors").write_bytes(state)
    resumed = tiny.run(tmp_path / "stopped", **settings)
    assert tiny.weights_hash(resumed.transformer) == tiny.weights_hash(whole.transformer)
