# SPDX-License-Identifier: Apache-2.0
"""Moments against a direct computation from recorded inputs, on stock pipelines."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import plan_conversion
from diffusers_ternary.calibration.statistics import GroupFinder, InputGroup, MomentCollector, split_passes
from diffusers_ternary.rollouts import Rollouts, make_rollouts
from integration_tests.support.pipelines import PIPELINES, TinyPipeline


PROMPTS = ["a red cat", "a blue dog", "a house"]


def rollouts_for(tiny: TinyPipeline, pipeline, *, prompts=PROMPTS, batch_size=2, **call) -> Rollouts:
    kwargs = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 2, **call}
    return make_rollouts(pipeline, prompts, seed=3, batch_size=batch_size, call_kwargs=kwargs)


def rows_of(module, x):
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    # Every patch, cut out by a convolution with the unit matrix.
    size = module.weight[0].numel()
    eye = torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:])
    return nn.functional.conv2d(x, eye, None, module.stride, module.padding).movedim(1, -1).reshape(-1, size)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_moments_are_those_of_the_inputs(name):
    tiny = PIPELINES[name]
    pipeline = tiny.build()
    model = getattr(pipeline, tiny.denoiser)
    layers = list(plan_conversion(model, TernaryConfig()).kinds)
    rollouts = rollouts_for(tiny, pipeline)
    recorded: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}

    def recorder(layer):
        return lambda module, args: recorded[layer].append(rows_of(module, args[0].double()).numpy())

    with GroupFinder(model, layers) as finder:
        rollouts.run(pipeline, description="")
    groups = finder.groups()
    handles = [model.get_submodule(layer).register_forward_pre_hook(recorder(layer)) for layer in layers]
    with MomentCollector(model, groups) as collector:
        rollouts.run(pipeline, description="")
    for handle in handles:
        handle.remove()
    moments = collector.moments()

    assert sorted(layer for group in groups for layer in group.layers) == sorted(layers)
    for group in groups:
        for layer in group.layers:
            x = np.concatenate(recorded[layer])
            found = moments[group.layers[0]]
            assert found.count == len(x)
            tolerance = 1e-5 * np.abs(x).max() ** 2
            np.testing.assert_allclose(found.second.numpy(), x.T @ x / len(x), atol=tolerance)
            np.testing.assert_allclose(found.mean.numpy(), x.mean(axis=0), atol=1e-5 * np.abs(x).max())
            centered = x - x.mean(axis=0)
            np.testing.assert_allclose(found.covariance().numpy(), centered.T @ centered / len(x), atol=2 * tolerance)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_query_key_and_value_share_their_input():
    tiny = PIPELINES["flux"]
    pipeline = tiny.build()
    layers = list(plan_conversion(pipeline.transformer, TernaryConfig()).kinds)
    with GroupFinder(pipeline.transformer, layers) as finder:
        rollouts_for(tiny, pipeline, prompts=PROMPTS[:1]).run(pipeline, description="")
    groups = {group.layers for group in finder.groups()}
    block = "transformer_blocks.0.attn"
    assert tuple(f"{block}.to_{name}" for name in "qkv") in groups
    assert tuple(f"{block}.add_{name}_proj" for name in "qkv") in groups
    assert (f"{block}.to_out.0",) in groups


def test_inputs_changed_in_place_are_not_shared():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x) + self.b(x)
            x.mul_(2.0)
            return y + self.c(x)

    model = Block()
    with GroupFinder(model, ["a", "b", "c"]) as finder, torch.no_grad():
        model(torch.randn(2, 4))
    assert finder.groups() == [InputGroup(("a", "b"), 4), InputGroup(("c",), 4)]


def test_guidance_branches_and_batches_are_all_counted():
    tiny = PIPELINES["flux"]
    pipeline = tiny.build()
    group = InputGroup(("transformer_blocks.0.attn.to_q",), pipeline.transformer.inner_dim)
    counts = []
    for call in ({}, {"negative_prompt": "ugly", "true_cfg_scale": 3.0}):
        with MomentCollector(pipeline.transformer, [group]) as collector:
            rollouts_for(tiny, pipeline, **call).run(pipeline, description="")
        counts.append(collector.moments()[group.layers[0]].count)
    tokens = (tiny.size // pipeline.vae_scale_factor // 2) ** 2
    assert counts == [len(PROMPTS) * 2 * tokens, 2 * len(PROMPTS) * 2 * tokens]


def test_the_same_seed_gives_the_same_moments_whatever_the_batch():
    tiny = PIPELINES["flux"]
    pipeline = tiny.build()
    group = InputGroup(("single_transformer_blocks.0.proj_mlp",), pipeline.transformer.inner_dim)
    found = []
    for batch_size in (2, 2, 3):
        with MomentCollector(pipeline.transformer, [group], dtype=torch.float64) as collector:
            rollouts_for(tiny, pipeline, batch_size=batch_size).run(pipeline, description="")
        found.append(collector.moments()[group.layers[0]].second)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


def test_nan_activations_name_layer_and_step():
    tiny = PIPELINES["flux"]
    pipeline = tiny.build()
    layer = "single_transformer_blocks.0.attn.to_q"
    calls = []

    def poison(module, args):
        calls.append(1)
        if len(calls) == 2:
            args[0][0, 0, 0] = float("nan")

    handle = pipeline.transformer.get_submodule(layer).register_forward_pre_hook(poison)
    group = InputGroup((layer,), pipeline.transformer.inner_dim)
    collector = MomentCollector(pipeline.transformer, [group])
    message = rf"{layer}: its input holds NaN or Inf at timestep 0\.\d+ \(denoiser call 1, "
    with pytest.raises(ValueError, match=message), collector:
        rollouts_for(tiny, pipeline).run(pipeline, description="")
    handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipeline.transformer.modules())


def test_layers_that_are_never_called_have_no_tokens():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with MomentCollector(model, [InputGroup(("0",), 3)]) as collector:
        pass
    moments = collector.moments()["0"]
    assert moments.count == 0
    assert float(moments.second.abs().max()) == 0.0


def test_passes_keep_to_the_limit():
    groups = [InputGroup((f"layer{i}",), 10) for i in range(5)]
    size = groups[0].bytes(torch.float32)
    assert split_passes(groups, limit=None, dtype=torch.float32) == [groups]
    parts = split_passes(groups, limit=2 * size, dtype=torch.float32)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [group for part in parts for group in part] == groups
    with pytest.raises(ValueError, match=r"layer0: .* Raise memory_limit"):
        split_passes(groups, limit=size - 1, dtype=torch.float32)


@pytest.mark.parametrize(
    ("prompts", "call", "error", "message"),
    [
        ([], {}, ValueError, "no prompts"),
        ("a cat", {}, TypeError, r"prompts=\[...\]"),
        (["a cat", " "], {}, ValueError, r"prompts\[1\]=' ' is empty"),
        (["a cat", 3], {}, TypeError, r"prompts\[1\]=3 is not a string"),
        (["a cat"], {"output_type": "pil"}, ValueError, "output_type, which is set for every rollout"),
        (["a cat"], {"cfg": 2}, ValueError, "FluxPipeline takes no cfg"),
    ],
)
def test_bad_prompts_and_arguments(prompts, call, error, message):
    with pytest.raises(error, match=message):
        make_rollouts(PIPELINES["flux"].build(), prompts, seed=0, batch_size=1, call_kwargs=call)


def test_the_hash_depends_on_prompts_and_order():
    pipeline = PIPELINES["flux"].build()
    hashes = {
        make_rollouts(pipeline, prompts, seed=0, batch_size=1, call_kwargs=None).sha256()
        for prompts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b"])
    }
    assert len(hashes) == 3


@torch.no_grad()
def test_moments_with_the_inputs_of_the_float_model():
    """Two layers, of which the first is another one now; each call is made with both."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    float_layer, now = model[0], nn.Linear(4, 3)
    model[0] = now

    @contextlib.contextmanager
    def as_it_was():
        model[0] = float_layer
        yield
        model[0] = now

    calls = [torch.randn(5, 4) for _ in range(3)]
    with MomentCollector(model, [InputGroup(("1",), 3)], dtype=torch.float64, reference=as_it_was) as collector:
        for x in calls:
            assert torch.equal(model(x), model[1](now(x)))
    found = collector.moments()["1"]
    x = torch.cat(calls)
    expected, got = float_layer(x).double(), now(x).double()
    assert found.count == 15
    torch.testing.assert_close(found.second, got.T @ got / 15)
    torch.testing.assert_close(found.reference.cross, got.T @ expected / 15)
    torch.testing.assert_close(found.reference.mean, expected.mean(dim=0))
