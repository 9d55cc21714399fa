# SPDX-License-Identifier: Apache-2.0
"""The student while it is trained: a float twin of the packed denoiser, and the way back."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..backend import packed_layers
from ..layers import TernaryLayer
from .trainable import LayerTraining, TrainableTernaryLayer, whole


def ternary_layers(student: nn.Module) -> dict[str, TernaryLayer]:
    """The ternary layers of a quantized denoiser by name."""
    return {name: layer for name, layer in packed_layers(student).items() if isinstance(layer, TernaryLayer)}


def make_trainee(student: nn.Module, teacher: nn.Module, training: Mapping[str, LayerTraining]) -> nn.Module:
    """A copy of a packed denoiser whose ternary layers can be trained.

    Args:
        student (`nn.Module`): packed. Not changed, and no memory is shared with it.
        teacher (`nn.Module`): float, of the same architecture; gives latents their values. Not changed.
        training (`Mapping[str, LayerTraining]`): what is trained of each layer; the others stay packed.

    Returns:
        `nn.Module`: only the parameters of the layers in `training` require a gradient.
    """
    twins: dict[int, object] = {}
    for name, layer in ternary_layers(student).items():
        if name in training:
            weight = teacher.get_parameter(f"{name}.weight")
            twins[id(layer)] = TrainableTernaryLayer(layer, weight, training[name])
    # Deepcopy takes what is in its memo for copied: the trainable twins, instead of copies of the packed layers.
    quantizer = getattr(student, "hf_quantizer", None)
    trainee = copy.deepcopy(student, {**twins, id(quantizer): None})
    ours = {id(parameter) for twin in twins.values() for parameter in twin.parameters()}  # type: ignore[attr-defined]
    for parameter in trainee.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)
    return trainee.eval()  # no dropout: the teacher has none


def train_others(trainee: nn.Module, which: str) -> None:
    """Makes parameters outside the ternary layers trainable, in float32.

    Args:
        trainee (`nn.Module`): changed in place.
        which (`str`): `"none"`, `"vectors"` (one-dimensional ones: biases and norms) or `"all"`.
    """
    if which == "none":
        return
    for module in list(trainee.modules()):
        if isinstance(module, TrainableTernaryLayer):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and (which == "all" or parameter.dim() == 1):
                module.register_parameter(name, nn.Parameter(parameter.detach().float()))


@torch.no_grad()
def write_back(trainee: nn.Module, student: nn.Module) -> None:
    """Packs the trained weights into the student, bit for bit as they were multiplied. Under FSDP all must call it.

    Args:
        trainee (`nn.Module`): from [`make_trainee`].
        student (`nn.Module`): the packed denoiser it was made of, changed in place; float parameters keep its dtypes.
    """
    own = dict(student.named_parameters())
    for name, module in trainee.named_modules():
        if isinstance(module, TrainableTernaryLayer):
            layer = student.get_submodule(name)
            assert isinstance(layer, TernaryLayer)
            layer.install_weight(module.pack().to(layer.weight.device))
            if module.bias is not None:
                layer.get_parameter("bias").copy_(whole(module.bias))
            continue
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                own[f"{name}.{part}" if name else part].copy_(whole(parameter))
