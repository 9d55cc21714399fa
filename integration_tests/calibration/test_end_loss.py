# SPDX-License-Identifier: Apache-2.0
"""Second moments of gradients against Jacobians that are known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import plan_conversion
from diffusers_ternary.calibration import end_loss
from diffusers_ternary.calibration.end_loss import OutputCollector
from diffusers_ternary.calibration.statistics import MomentCollector, find_groups
from diffusers_ternary.layers import input_rows, output_rows
from diffusers_ternary.rollouts import make_rollouts
from integration_tests.support.pipelines import PIPELINES


class Chain(nn.Module):
    """Linear maps, with a gate between them that depends on the token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor]:
        self.unused(x)
        return (self.second(self.first(x).mul_(gate)),)


@torch.no_grad()
def test_moments_of_the_gradients_are_those_of_the_jacobians():
    model = Chain()
    x, gate = torch.randn(4, 2000, 5), torch.rand(4, 2000, 1)
    plain = model(x, gate)[0]
    with OutputCollector(model, ["first", "second", "unused"], dtype=torch.float64, seed=0) as collector:
        observed = model(x, gate)[0]
        assert not torch.is_grad_enabled()
    assert torch.equal(observed, plain)
    found = collector.outputs()
    assert found.keys() == {"first", "second"}
    jacobian = model.second.weight.double()
    expected = gate.double().square().mean() * jacobian.T @ jacobian
    torch.testing.assert_close(found["first"], expected, atol=0.05 * float(expected.diagonal().mean()), rtol=0.0)
    torch.testing.assert_close(found["second"], torch.eye(4, dtype=torch.float64), atol=0.05, rtol=0.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_gradients_that_are_not_finite_name_the_layer():
    model = Chain()
    with OutputCollector(model, ["first"], dtype=torch.float32, seed=0) as collector:
        model(torch.randn(2, 5), torch.full((2, 1), 1e25))  # its square is not
    with pytest.raises(ValueError, match=r"first: the gradient .* end_loss=False"):
        collector.outputs()


def test_a_prediction_that_is_not_finite_is_named_itself():
    model = Chain()
    with torch.no_grad(), OutputCollector(model, ["first"], dtype=torch.float32, seed=0):
        with pytest.raises(ValueError, match=r"denoiser's own output holds NaN or Inf"):
            model(torch.randn(2, 5), torch.full((2, 1), torch.inf))
        assert not torch.is_grad_enabled()


def test_a_failed_call_leaves_gradients_off():
    model = Chain()
    with torch.no_grad(), OutputCollector(model, ["first"], dtype=torch.float32, seed=0):
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 7), torch.ones(2, 1))
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}])
def test_rows_of_outputs_are_those_of_the_inputs(options):
    module = nn.Conv2d(3, 5, 3, bias=False, **options)
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(
        output_rows(module, module(x)), F.linear(input_rows(module, x), module.weight.flatten(1))
    )
    torch.testing.assert_close(output_rows(module, module(x[0])), output_rows(module, module(x[:1])))


def test_checkpointed_activations_give_the_same(monkeypatch):
    tiny = PIPELINES["flux"]
    pipeline = tiny.build()
    model = pipeline.transformer
    layers = list(plan_conversion(model, TernaryConfig()).kinds)
    call = {**tiny.call, "height": tiny.size, "width": tiny.size, "num_inference_steps": 1}
    rollouts = make_rollouts(pipeline, ["a red cat"], seed=3, batch_size=1, call_kwargs=call)
    groups = find_groups(pipeline, model, layers, rollouts)
    results = []
    for limit in (end_loss.CHECKPOINTED_WEIGHTS, 0):
        monkeypatch.setattr(end_loss, "CHECKPOINTED_WEIGHTS", limit)
        with OutputCollector(model, layers, dtype=torch.float32, seed=0) as outputs:
            assert model.is_gradient_checkpointing == (limit == 0)
            with MomentCollector(model, groups) as moments:
                rollouts.run(pipeline, description="")
        results.append((outputs.outputs(), moments.moments()))
    assert not model.is_gradient_checkpointing
    (first, inputs), (second, again) = results
    assert first.keys() == second.keys()
    assert len(first) == len(layers)
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    for name in inputs:
        assert inputs[name].count == again[name].count
