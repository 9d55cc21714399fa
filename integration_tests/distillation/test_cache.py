# SPDX-License-Identifier: Apache-2.0
"""The teacher cache: what the denoiser really got, resumable, checked, and refused when it is of something else."""

import errno
import pathlib

import pytest
import torch
from torch import nn

from diffusers_ternary.distillation.cache import TeacherCache
from diffusers_ternary.distillation.layout import MASK, SHARED, STACKED, Branch
from diffusers_ternary.distillation.recording import TeacherRecorder
from diffusers_ternary.files import lock
from diffusers_ternary.rollouts import make_rollouts, named_arguments, recorded_calls, sample_name, timestep_name
from integration_tests.support.fresh_process import run_python
from integration_tests.support.pipelines import PIPELINES


PROMPTS = ["a red cat", "a blue dog", "a house"]
STEPS = 3
GUIDED = {"flux": {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}}


def call_kwargs(name: str, **extra):
    tiny = PIPELINES[name]
    return {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": STEPS, **extra}


def recorder(name="flux", pipeline=None, prompts=PROMPTS, *, component=None, rollout_states=2, **options):
    """Draws the prompts, two at a time."""
    options = {"call_kwargs": call_kwargs(name), "batch_size": 2, "seed": 0, **options}
    pipeline = pipeline or PIPELINES[name].build()
    component = component or PIPELINES[name].denoiser
    return TeacherRecorder(pipeline, component, make_rollouts(pipeline, prompts, **options), rollout_states)


def build(folder, name="flux", pipeline=None, prompts=PROMPTS, process=0, processes=1, **options):
    found = recorder(name, pipeline, prompts, **options)
    return TeacherCache.build(found, folder, process=process, processes=processes)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def evaluation_mode(pipeline):
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


@pytest.mark.parametrize(("name", "extra"), [*((name, {}) for name in PIPELINES), *GUIDED.items()])
def test_rows_are_what_the_denoiser_got(name, extra, tmp_path):
    """Each cached row is replayed through the teacher, and compared with the pipeline's own call of that prompt."""
    call = call_kwargs(name, **extra)
    tiny = PIPELINES[name]
    pipeline = evaluation_mode(tiny.build())
    denoiser = getattr(pipeline, tiny.denoiser)
    cache = build(tmp_path, name, pipeline, call_kwargs=call, seed=5, rollout_states=STEPS)
    for index, prompt in enumerate(PROMPTS):
        single = {"negative_prompt": [call["negative_prompt"]]} if "negative_prompt" in call else {}
        with recorded_calls(denoiser) as calls:
            generator = torch.Generator().manual_seed(5 + index)
            latents = pipeline([prompt], generator=[generator], output_type="latent", **{**call, **single})[0]
        batch = cache.batch([index], torch.Generator().manual_seed(index))
        assert distance(batch.sample.reshape(latents.shape), latents.float()) < 1e-4
        state, timestep = batch.rollout
        step = [call for call in calls if call.step == step_of(calls, float(timestep))]
        expected = torch.cat([call.output for call in step])
        conditioned = predict(denoiser, cache, state, timestep, batch.conditioning)
        branches = [conditioned]
        if batch.null_conditioning is not None:
            branches.append(predict(denoiser, cache, state, timestep, batch.null_conditioning))
        assert len(branches) == len(expected)
        for position, prediction in enumerate(branches):
            row = cache.layout.position if position == 0 else 1 - cache.layout.position
            assert distance(prediction[0], expected[row]) < 1e-4
        given = named_arguments(denoiser, step[0])[sample_name(denoiser)]
        assert distance(state[0], torch.as_tensor(given[0]).float()) < 1e-4


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; the cache is drawn two prompts at a time, which changes the last bits."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def step_of(calls, timestep):
    return next(call.step for call in calls if call.timestep == pytest.approx(timestep, rel=1e-6, abs=1e-6))


@torch.no_grad()
def predict(denoiser, cache, state, timestep, conditioning):
    sample = list(state) if cache.layout.listed else state
    output = denoiser(**{sample_name(denoiser): sample, timestep_name(denoiser): timestep}, **conditioning)[0]
    return torch.stack(output) if isinstance(output, list) else output


# Where the negative prompt's branch is among the two, by the source of each pipeline.
@pytest.mark.parametrize(
    ("name", "position"), [("flux", 0), ("sd3", 1), ("sana", 1), ("pixart", 1), ("sdxl", 1), ("z_image", 0)]
)
def test_the_prompt_s_branch_is_told_from_the_negative_one(name, position, tmp_path):
    """Found from what the scheduler follows, not from a list of pipelines."""
    cache = build(tmp_path, name, call_kwargs=call_kwargs(name, **GUIDED.get(name, {})), prompts=PROMPTS[:1])
    assert cache.layout.position == position


def test_no_guidance_no_null_conditioning(tmp_path):
    batch = build(tmp_path).batch([0])
    assert batch.null_conditioning is None
    assert batch.sample.dtype == torch.float32


def test_without_rollout_states(tmp_path):
    assert build(tmp_path, rollout_states=0).batch([0, 1]).rollout is None


def test_the_generator_alone_decides_on_the_step(tmp_path):
    cache = build(tmp_path, rollout_states=STEPS)
    first, again, other = (
        torch.cat([cache.batch([0, 1, 2], generator).rollout[1] for _ in range(5)])
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == STEPS


def test_a_second_build_draws_nothing(tmp_path):
    build(tmp_path)
    before = contents(tmp_path)
    pipeline = PIPELINES["flux"].build()
    with recorded_calls(pipeline.transformer) as calls:
        cache = build(tmp_path, pipeline=pipeline)
    assert not calls
    assert contents(tmp_path) == before
    assert cache.manifest.prompts == tuple(PROMPTS)
    assert len(cache) == 3
    opened = TeacherCache.open(tmp_path, cache.manifest.fingerprint)
    assert opened.manifest.identity["prompts_sha256"] == cache.manifest.identity["prompts_sha256"]


def many(count: int) -> list[str]:
    return [f"{number} cats" for number in range(count)]


def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL while the second shard is drawn, then a rerun; compared with a run that nobody interrupted."""
    code = """
    import os, signal, sys, pathlib
    from integration_tests.distillation import test_cache as tests
    pipeline = tests.PIPELINES["flux"].build()
    folder = pathlib.Path(sys.argv[1])
    def kill(module, args, output):
        if (folder / "shard-00000.safetensors.sha256").exists():
            os.kill(os.getpid(), signal.SIGKILL)
    pipeline.transformer.register_forward_hook(kill)
    tests.build(folder, pipeline=pipeline, prompts=tests.many(70), batch_size=32, rollout_states=1)
    """
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with pytest.raises(AssertionError, match="the fresh process failed"):
        run_python(code, killed)
    assert (killed / "shard-00000.safetensors").exists()
    assert not (killed / "shard-00001.safetensors").exists()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing"):
        TeacherCache.open(killed)
    build(killed, prompts=many(70), batch_size=32, rollout_states=1)
    build(whole, prompts=many(70), batch_size=32, rollout_states=1)
    assert contents(killed) == contents(whole)


def test_processes_share_the_work(tmp_path):
    for process in (1, 0):
        build(tmp_path / "two", prompts=many(70), batch_size=32, process=process, processes=2)
    build(tmp_path / "one", prompts=many(70), batch_size=32)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("damage", ["flip", "truncate", "hash"])
def test_a_corrupted_shard_is_named_and_drawn_again(damage, tmp_path, caplog):
    build(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:100])
    else:
        (tmp_path / "shard-00000.safetensors.sha256").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.safetensors (is corrupted|has no hash)"):
        TeacherCache.open(tmp_path)
    with caplog.at_level("WARNING"):
        build(tmp_path)
    assert "shard-00000.safetensors" in caplog.text
    assert contents(tmp_path) == before


def test_damaged_manifests_are_refused(tmp_path):
    build(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    for damaged, message in ((text[:50], "damaged"), ("{}", "damaged"), ('{"format_version": 99}', "version 99")):
        manifest.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            TeacherCache.open(tmp_path)
        with pytest.raises(ValueError, match=message):
            build(tmp_path)
        assert manifest.read_text(encoding="utf-8") == damaged
    manifest.write_text(text, encoding="utf-8")
    (tmp_path / "shared.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"shared.safetensors is corrupted"):
        TeacherCache.open(tmp_path)


def changed_weights(pipeline):
    with torch.no_grad():
        pipeline.transformer.proj_out.weight[0, 0] += 1


def changed_scheduler(pipeline):
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=7.0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (changed_weights, {}, "weights_sha256"),
        (changed_scheduler, {}, r"scheduler.shift: 1.0 there, 7.0 now"),
        (None, {"call_kwargs": call_kwargs("flux", guidance_scale=2.0)}, r"call_kwargs.guidance_scale: None there"),
        (None, {"prompts": PROMPTS[::-1]}, "prompts_sha256"),
        (None, {"seed": 1}, "seed: 0 there, 1 now"),
        (None, {"rollout_states": 3}, "rollout_states: 2 there, 3 now"),
    ],
)
def test_another_teacher_is_refused_and_nothing_overwritten(change, options, message, tmp_path):
    cache = build(tmp_path)
    before = contents(tmp_path)
    pipeline = PIPELINES["flux"].build()
    if change is not None:
        change(pipeline)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, pipeline=pipeline, **options)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="another folder"):
        TeacherCache.open(tmp_path, cache.manifest.fingerprint[::-1])


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path):
    """Files may not grow beyond 2.5 kB here: what the kernel then says is handled like a full disk."""
    code = """
    import json, resource, sys, pathlib
    from integration_tests.distillation import test_cache as tests
    pipeline = tests.PIPELINES["flux"].build()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
    try:
        tests.build(pathlib.Path(sys.argv[1]), pipeline=pipeline)
    except OSError as error:
        print(json.dumps([error.errno, str(error)]))
    """
    number, message = run_python(code, tmp_path)
    assert number == errno.EFBIG
    assert "cannot be written" in message
    assert "run again" in message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("shard") or "partial" in path.name]
    complete = build(tmp_path / "elsewhere")
    build(tmp_path)
    assert TeacherCache.open(tmp_path).manifest.fingerprint == complete.manifest.fingerprint


def test_one_run_draws_a_cache_and_many_read_it(tmp_path):
    with (
        lock(tmp_path / "cache", "a test"),
        pytest.raises(BlockingIOError, match="in use by another run, which is draw"),
    ):
        build(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    complete = build(tmp_path / "cache")
    shard = complete.shard_path(0)
    with lock(tmp_path / "cache", "a test"):
        assert build(tmp_path / "cache").manifest.fingerprint == complete.manifest.fingerprint
    shard.unlink()
    shard.with_name(f".{shard.name}.0a1b2c3d.partial").write_text("half")
    build(tmp_path / "cache")
    assert shard.is_file()
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_cache_that_cannot_fit_is_refused(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("diffusers_ternary.distillation.cache.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"needs .* GB more .* online mode"):
        build(tmp_path)
    assert not list(tmp_path.glob("shard*"))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="rollout_states=-1"):
        build(tmp_path, rollout_states=-1)
    with pytest.raises(ValueError, match="no prompts"):
        build(tmp_path, prompts=[])
    with pytest.raises(ValueError, match="has no text_decoder to distill"):
        build(tmp_path, component="text_decoder")
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        TeacherCache.open(tmp_path)
    pipeline = PIPELINES["flux"].build()
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or Inf for 'a red cat' \(seed 0\)"):
        build(tmp_path, pipeline=pipeline)
    cache = build(tmp_path / "good")
    for index in (-1, 3):
        with pytest.raises(IndexError, match="not between 0 and 2"):
            cache.batch([index])


def test_inputs_that_change_over_the_steps_are_refused(tmp_path):
    def change(pipeline, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1}

    call = call_kwargs("flux", callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(ValueError, match=r"changes the denoiser's input encoder_hidden_states"):
        build(tmp_path, call_kwargs=call)


def test_the_pipeline_is_left_as_it_was(tmp_path):
    pipeline = PIPELINES["sd3"].build()
    pipeline.text_encoder.train()
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    build(tmp_path, "sd3", pipeline)
    assert pipeline.text_encoder.training
    assert "step" not in vars(pipeline.scheduler)
    assert not pipeline.transformer._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())


def test_rows_of_unequal_length_are_padded_and_masked():
    """Pipelines that pad to the longest prompt of a call (Qwen-Image) leave rows of several lengths, some unmasked."""
    text, mask = ("encoder_hidden_states",), ("encoder_hidden_states_mask",)
    branch = Branch({text: STACKED, mask: MASK, ("guidance",): SHARED}, {("guidance",): None})
    short, masked, plain = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 3)
    rows = [{text: short}, {text: masked, mask: torch.tensor([1, 1, 1, 0])}]
    inputs = branch.assemble(rows)
    assert torch.equal(inputs["encoder_hidden_states"][0, :2], short)
    assert float(inputs["encoder_hidden_states"][0, 2:].abs().sum()) == 0
    assert inputs["encoder_hidden_states_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert branch.assemble([{text: plain}, {text: masked}])["encoder_hidden_states_mask"] is None
    unmasked = Branch({text: STACKED}, {})
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\), \(4, 3\)\] and no mask"):
        unmasked.assemble([{text: short}, {text: plain}])
