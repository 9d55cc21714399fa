# SPDX-License-Identifier: Apache-2.0
"""The trainable twin multiplies by what it packs, and a model goes to trainable and back without loss."""

import copy

import pytest
import torch
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.distillation.trainable import LayerTraining, TrainableTernaryLayer
from diffusers_ternary.distillation.trainee import make_trainee, ternary_layers, train_others, write_back
from diffusers_ternary.format import TernarySpec
from diffusers_ternary.layers import TernaryConv2d, TernaryLinear
from diffusers_ternary.ternarize import rotate, ternarize
from integration_tests.support import denoisers
from integration_tests.support.column_scales import with_column_scale


LAYERS = [
    {"group_size": 8},
    {"group_size": 8, "scales": "group"},
    {"group_size": 5, "scales": "double"},
    {"group_size": None},
    {"group_size": 8, "hadamard": 8},
    {"group_size": 8, "rank": 2},
    {"group_size": 8, "hadamard": 16, "rank": 3},
    {"group_size": 8, "hadamard": 16, "rank": 3, "column_scales": True},
]
TRAININGS = [
    LayerTraining(latents=True),
    LayerTraining(latents=False),
    LayerTraining(latents=True, scales=False),
    LayerTraining(latents=False, low_rank=True, rank=2),
]


def rounding(options):
    """Arguments of `ternarize`, which makes no column scales."""
    return {name: value for name, value in options.items() if name != "column_scales"}


def packed_layer(options, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(12, 20)
    packed = ternarize(weight, **rounding(options))
    if options.get("column_scales"):
        packed = with_column_scale(packed)
    return TernaryLinear.from_weight(packed, torch.randn(12), activation_dtype="none"), weight


def effective(twin):
    """The complete weight that the twin multiplies by."""
    dense = rotate(twin.quantized_weight(), twin.spec.hadamard)
    if twin.column_scale is not None:
        dense = dense * twin.column_scale
    if twin.low_rank_up is not None:
        dense = dense + twin.low_rank_up.half().float() @ twin.low_rank_down.half().float()
    return dense


def disturb(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += (
                    0.1 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean().clamp(0.1)
                )


@pytest.mark.parametrize("training", TRAININGS, ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_starts_as_the_packed_layer(options, training):
    layer, weight = packed_layer(options)
    twin = TrainableTernaryLayer(layer, weight, training)
    packed = twin.pack()
    assert torch.equal(packed.codes(), ternarize(weight, **rounding(options)).codes())
    torch.testing.assert_close(effective(twin), layer.dequantize(), rtol=0, atol=layer.dequantize().abs().max() / 100)
    x = torch.randn(3, 20)
    torch.testing.assert_close(twin(x), layer(x), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("training", TRAININGS, ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_packs_bit_for_bit_what_it_multiplies_by(options, training, seed):
    layer, weight = packed_layer(options)
    twin = TrainableTernaryLayer(layer, weight, training)
    disturb(twin, seed)
    packed = twin.pack()
    assert torch.equal(packed.dequantize(), effective(twin))
    restored = TernaryLinear.from_weight(packed, twin.bias, activation_dtype="none")
    assert torch.equal(restored.dequantize(), effective(twin))
    x = torch.randn(4, 20)
    torch.testing.assert_close(restored(x), twin(x), rtol=1e-5, atol=1e-5)


def test_what_is_frozen_stays_bit_identical():
    layer, weight = packed_layer({"group_size": 5, "scales": "double"})
    twin = TrainableTernaryLayer(layer, weight, LayerTraining(latents=False, scales=False))
    assert [name for name, p in twin.named_parameters() if p.requires_grad] == ["bias"]
    packed = twin.pack()
    assert torch.equal(packed.packed, layer.weight)
    assert torch.equal(packed.scale, layer.scales)
    assert torch.equal(packed.multiplier, layer.weight_multiplier)


def test_every_trained_parameter_takes_a_gradient():
    layer, weight = packed_layer({"group_size": 8, "hadamard": 16, "rank": 3})
    twin = TrainableTernaryLayer(layer, weight, LayerTraining(latents=True, low_rank=True))
    twin(torch.randn(3, 20)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert set(gradients) == {"latent", "scale", "bias", "low_rank_up", "low_rank_down"}
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients.values())


def test_autocast_and_16_bit_inputs():
    layer, weight = packed_layer({"group_size": 8})
    twin = TrainableTernaryLayer(layer, weight, LayerTraining(latents=True))
    assert twin(torch.randn(2, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert twin(torch.randn(2, 20)).dtype == torch.bfloat16


@pytest.mark.parametrize("latents", [True, False])
def test_a_model_to_trainable_and_back(latents):
    torch.manual_seed(0)
    teacher = denoisers.sana().eval()
    student = quantize(copy.deepcopy(teacher), TernaryConfig(group_size=16, activation_dtype="none"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainee = make_trainee(student, teacher, {n: LayerTraining(latents=latents) for n in ternary_layers(student)})
    train_others(trainee, "vectors")
    trained = {name for name, parameter in trainee.named_parameters() if parameter.requires_grad}
    assert any(name.endswith(".latent") for name in trained) == latents
    others = [name for name in trained if not isinstance(owner(trainee, name), TrainableTernaryLayer)]
    assert others
    assert all(trainee.get_parameter(name).dim() == 1 for name in others)
    disturb(trainee, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items()), "memory is shared"
    write_back(trainee, student)
    for name, layer in ternary_layers(student).items():
        assert torch.equal(layer.dequantize().flatten(1), trainee.get_submodule(name).quantized_weight())
        if layer.bias is not None:
            assert torch.equal(layer.bias, trainee.get_submodule(name).bias)
    for name in others:
        assert torch.equal(student.get_parameter(name), trainee.get_parameter(name))


def test_saving_after_a_rank_was_added(tmp_path):
    torch.manual_seed(0)
    teacher = denoisers.sana().eval()
    student = quantize(copy.deepcopy(teacher), TernaryConfig(group_size=16, activation_dtype="none"))
    training = LayerTraining(latents=False, low_rank=True, rank=2)
    trainee = make_trainee(student, teacher, dict.fromkeys(ternary_layers(student), training))
    disturb(trainee, 0)
    write_back(trainee, student)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    for name, layer in ternary_layers(loaded).items():
        assert layer.spec.rank == 2
        assert torch.equal(layer.dequantize(), student.get_submodule(name).dequantize())


def owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


@pytest.mark.parametrize("training", TRAININGS, ids=str)
@pytest.mark.parametrize("options", [{}, {"hadamard": 8}, {"rank": 2}], ids=str)
@pytest.mark.parametrize("kernel", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}], ids=str)
def test_convolutions(kernel, options, training):
    torch.manual_seed(3)
    float_conv = nn.Conv2d(8, 12, **kernel)
    packed = TernaryConv2d(
        TernarySpec(12, float_conv.weight[0].numel(), 8), float_conv, bias=False, activation_dtype="none"
    )
    packed.bias = float_conv.bias
    packed.pack(float_conv.weight.detach(), **options)
    twin = TrainableTernaryLayer(packed, float_conv.weight, training)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(twin(x), packed(x), atol=1e-5, rtol=1e-5)
    disturb(twin, 4)
    packed.install_weight(twin.pack())
    packed.bias = nn.Parameter(twin.bias.detach(), requires_grad=False)
    torch.testing.assert_close(twin(x), packed(x), atol=1e-5, rtol=1e-5)
    twin(x).square().sum().backward()
    for parameter in twin.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
