# SPDX-License-Identifier: Apache-2.0
"""The loss against its formula, and the blocks that it looks at."""

import copy

import pytest
import torch

from diffusers_ternary.distillation.blocks import block_names, recorded_blocks
from diffusers_ternary.distillation.loss import (
    DenoiserInputs,
    StudentNetwork,
    Targets,
    block_error,
    observe,
    relative_error,
)
from integration_tests.support import denoisers, distillation


def inputs(seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return DenoiserInputs(
        torch.randn(rows, 16, 4, generator=generator),
        torch.rand(rows, generator=generator),
        {
            "encoder_hidden_states": torch.randn(rows, 8, 32, generator=generator),
            "pooled_projections": torch.randn(rows, 32, generator=generator),
            "txt_ids": torch.zeros(8, 3),
            "img_ids": torch.zeros(16, 3),
        },
    )


@pytest.fixture(scope="module")
def pair():
    teacher = distillation.teacher().transformer.eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return teacher, student


@torch.no_grad()
def asked(teacher, blocks, **options):
    return observe(teacher, inputs(), blocks, **options)


BLOCKS = ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0")


def test_blocks_are_the_outermost_numbered_modules(pair):
    assert block_names(name for name, _ in pair[0].named_modules() if "attn.to_q" in name) == BLOCKS
    unet = denoisers.sdxl_unet()
    found = block_names(name for name, _ in unet.named_modules() if name.endswith("to_q"))
    assert found == ("down_blocks.1", "up_blocks.0", "mid_block.attentions.0")


def test_relative_error_is_its_formula():
    student, teacher = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    assert float(relative_error(student, teacher)) == pytest.approx(4 / 17)
    assert float(relative_error(torch.zeros(2), torch.zeros(2))) == 0.0


def test_block_error_is_the_mean_over_blocks_of_the_mean_over_outputs():
    one = torch.ones(4)
    student = {"a": (one, 3 * one), "b": (one,)}
    teacher = {"a": (one, one), "b": (2 * one,)}
    assert float(block_error(student, teacher)) == pytest.approx(((0 + 4) / 2 + 0.25) / 2)


def test_the_loss_is_prediction_plus_blocks(pair):
    teacher, student = pair
    targets = asked(teacher, BLOCKS)
    loss = StudentNetwork(student, BLOCKS, block_weight=0.5)(inputs(), targets).item()
    with torch.no_grad():
        outputs = {}
        hooks = [
            student.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: outputs.update({name: output})
            )
            for name in BLOCKS
        ]
        arguments = {**inputs().conditioning, "timestep": inputs().timestep, "return_dict": False}
        prediction = student(inputs().sample, **arguments)[0]
    for hook in hooks:
        hook.remove()
    expected = (prediction - targets.prediction).square().mean() / targets.prediction.square().mean()
    parts = []
    for name, output in outputs.items():
        pairs = zip(output if isinstance(output, tuple) else (output,), targets.blocks[name], strict=True)
        parts.append(
            sum(float((s - t).square().sum() / t.square().sum()) for s, t in pairs) / len(targets.blocks[name])
        )
    assert loss == pytest.approx(float(expected) + 0.5 * sum(parts) / 3, rel=1e-4)


def test_gradients_with_checkpointing_are_the_same(pair):
    teacher, student = pair
    targets = asked(teacher, BLOCKS)
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(student)
        if checkpointing:
            trained.enable_gradient_checkpointing()
        StudentNetwork(trained, BLOCKS, block_weight=0.5)(inputs(), targets).backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_a_block_alone_ends_the_forward(pair):
    teacher, student = pair
    targets = asked(teacher, BLOCKS[:2], stop_after=BLOCKS[1])
    assert targets.prediction is None
    assert list(targets.blocks) == list(BLOCKS[:2])
    trained = copy.deepcopy(student)
    only = Targets(None, {BLOCKS[1]: targets.blocks[BLOCKS[1]]})
    StudentNetwork(trained, BLOCKS[1:2], block_weight=0.5, stop_after=BLOCKS[1])(inputs(), only).backward()
    assert trained.transformer_blocks[1].attn.to_q.weight.grad is not None
    assert trained.single_transformer_blocks[0].attn.to_q.weight.grad is None
    assert not any(module._forward_hooks for module in teacher.modules())


def test_nothing_is_recorded_outside(pair):
    """Nor is a forward ended: gradient checkpointing runs the blocks again in the backward."""
    with recorded_blocks(pair[0], BLOCKS, stop_after=BLOCKS[0]) as outputs:
        assert outputs == {}
        inputs().call(pair[0])
        pytest.fail("the forward went on")
    assert list(outputs) == [BLOCKS[0]]
    assert inputs().call(pair[0]).shape == (2, 16, 4)
    assert list(outputs) == [BLOCKS[0]]
    with pytest.raises(RuntimeError, match="of the model"), recorded_blocks(pair[0], BLOCKS):
        raise RuntimeError("of the model")
    assert not any(module._forward_hooks for module in pair[0].modules())


def test_a_learned_variance_is_left_out():
    torch.manual_seed(0)
    pixart = denoisers.pixart()
    made = DenoiserInputs(
        torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), {"encoder_hidden_states": torch.randn(2, 5, 32)}
    )
    assert made.call(pixart).shape == (2, 4, 8, 8)
