# SPDX-License-Identifier: Apache-2.0
"""Adapters with random weights, and pairs of a ternary pipeline and the same pipeline dequantized."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import nn

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.layers import QuantizedLayer

from . import denoisers
from .pipelines import PIPELINES, draw


# Ternary and int8 layers side by side, activations not rounded: equal to the dequantized model up to float32 sums.
EXACT = TernaryConfig(group_size=32, activation_dtype="none", overrides={"*attn*.to_k": "int8"})


def packed_names(model: nn.Module) -> list[str]:
    """The packed layers of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def lora_state(model: nn.Module, *, rank: int, seed: int, names: Iterable[str] | None = None) -> dict[str, Any]:
    """A LoRA in PEFT's layout, large enough to change the output visibly.

    For the layers `names` of a ternary model; by default all packed ones, and a float one beside them.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    state = {}
    for name in packed_names(model) + kept[-1:] if names is None else names:
        module = model.get_submodule(name)
        shape = module.weight_shape if isinstance(module, QuantizedLayer) else tuple(module.weight.shape)
        rows, columns = shape[0], math.prod(shape[1:])
        down = torch.randn(rank, *shape[1:], generator=generator) / columns**0.5
        up = torch.randn(rows, rank, *[1] * len(shape[2:]), generator=generator) * (0.2 / rank**0.5)
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return state


def with_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of `a - b`, relative to that of `b`."""
    return float((a - b).norm() / b.norm())


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pipeline and one recorded call of its denoiser.

    Args:
        pipeline (`DiffusionPipeline`): has the LoRA methods.
        component (`str`): name of the denoiser.
        call (`dict`): keyword arguments of the denoiser.
    """

    pipeline: DiffusionPipeline
    component: str
    call: dict[str, Any]

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.component)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """What the denoiser predicts."""
        output = self.denoiser(**copy.copy(self.call))
        sample = output[0] if isinstance(output, tuple) else output.sample
        return torch.cat([part.flatten() for part in sample]) if isinstance(sample, list) else sample.flatten()

    def twin(self, *, dequantized: bool = False) -> "Subject":
        """A copy with a denoiser of its own; the other components are shared."""
        denoiser = copy.deepcopy(self.denoiser)
        if dequantized:
            denoiser.dequantize()
        parts = {**self.pipeline.components, self.component: denoiser}
        parts = {name: part for name, part in parts.items() if part is not None or name != "transformer_2"}
        return Subject(type(self.pipeline)(**parts), self.component, self.call)


def ternary_subject(name: str, config: TernaryConfig = EXACT) -> Subject:
    """A tiny pipeline whose denoiser is ternary, in eval mode."""
    if name == "wan":
        torch.manual_seed(0)
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipeline = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=denoisers.wan()
        )
        component, call = "transformer", _wan_call()
    else:
        pipeline, component = PIPELINES[name].build(), PIPELINES[name].denoiser
        call = _record(name, pipeline, getattr(pipeline, component))
    denoiser = getattr(pipeline, component)
    denoiser.eval()
    quantize(denoiser, config)
    return Subject(pipeline, component, call)


def _record(name: str, pipeline: DiffusionPipeline, denoiser: nn.Module) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    draw(name, pipeline)
    handle.remove()
    return calls[0]


def _wan_call() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "return_dict": False,
    }
