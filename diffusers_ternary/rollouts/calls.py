# SPDX-License-Identifier: Apache-2.0
"""The teacher's denoiser calls, recorded while its pipeline draws, to be replayed through other weights."""

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


# What the denoisers of diffusers call it.
_TIMESTEPS = ("timestep", "t")


@dataclasses.dataclass(frozen=True)
class DenoiserCall:
    """One call of the teacher's denoiser, on the CPU.

    Args:
        step (`int`): denoising step, from 0.
        timestep (`float`): as the denoiser received it.
        args (`tuple`): positional inputs.
        kwargs (`dict[str, Any]`): keyword inputs.
        output (`torch.Tensor`): the prediction (the velocity, for flow-matching models).
    """

    step: int
    timestep: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor

    def replay(self, denoiser: nn.Module, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What another denoiser predicts from the same inputs, on the CPU.

        Args:
            denoiser (`nn.Module`): of the teacher's architecture; called, not changed.
            dtype (`torch.dtype`, *optional*): inputs of this dtype (the teacher's) are given in the denoiser's own.
        """
        device, own = _device(denoiser), float_dtype(denoiser)

        def put(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, own if tensor.dtype == dtype else tensor.dtype)

        return prediction_of(denoiser(*map_tensors(self.args, put), **map_tensors(self.kwargs, put))).detach().cpu()


@contextlib.contextmanager
def recorded_calls(denoiser: nn.Module) -> Iterator[list[DenoiserCall]]:
    """Records the calls of a denoiser while its pipeline runs in this thread. The hook is gone afterward.

    Consecutive calls with the same timestep are one step: the branches of classifier-free guidance.

    Raises:
        ValueError: if the denoiser is called without a timestep.
    """
    calls: list[DenoiserCall] = []
    store = _Store()
    ours = threading.get_ident()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != ours:
            return  # a training loop beside this pipeline calls the same denoiser
        timestep = timestep_of(module, args, kwargs)
        step = 0
        if calls:
            step = calls[-1].step + (calls[-1].timestep != timestep)
        calls.append(
            DenoiserCall(
                step,
                timestep,
                store.keep(args),
                store.keep(kwargs),
                prediction_of(output).detach().to("cpu", copy=True),
            )
        )

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def sample_name(denoiser: nn.Module) -> str:
    """Name of the argument that is denoised: the first one, in every denoiser of diffusers."""
    return _parameters(denoiser)[0]


def timestep_name(denoiser: nn.Module) -> str:
    """Name of the timestep among the arguments of a denoiser.

    Raises:
        ValueError: if it takes none.
    """
    names = _parameters(denoiser)
    for name in _TIMESTEPS:
        if name in names:
            return name
    raise ValueError(
        f"{type(denoiser).__name__} is called without a timestep, so its calls belong to no step. Leave the velocity "
        "error out: velocity_prompts=0 to evaluate, no size_budget and no sensitivity to calibrate."
    )


def timestep_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep of a call with these arguments, as the denoiser received it.

    Raises:
        ValueError: if there is none.
    """
    name = timestep_name(module)
    value = {**dict(zip(_parameters(module), args, strict=False)), **kwargs}.get(name)
    if value is None:
        raise ValueError(f"{type(module).__name__} is called without a {name}, so its calls belong to no step.")
    return float(value.flatten()[0]) if isinstance(value, torch.Tensor) else float(value)


def named_arguments(denoiser: nn.Module, call: DenoiserCall) -> dict[str, Any]:
    """All inputs of a recorded call by name, whichever way the pipeline passed them."""
    return {**dict(zip(_parameters(denoiser), call.args, strict=False)), **call.kwargs}


def _parameters(denoiser: nn.Module) -> list[str]:
    return list(inspect.signature(type(denoiser).forward).parameters)[1:]


def prediction_of(output: Any) -> torch.Tensor:
    """The prediction [rows, ...] in what a denoiser returns."""
    prediction = output[0]
    if isinstance(prediction, (list, tuple)):
        prediction = torch.stack(list(prediction))  # Z-Image predicts a list, one tensor per prompt
    assert isinstance(prediction, torch.Tensor)
    return prediction


def _device(module: nn.Module) -> torch.device:
    device = next(module.parameters()).device
    # Sequentially offloaded modules move their inputs themselves.
    return torch.device("cpu") if device.type == "meta" else device


def float_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's first floating parameter: that of its inputs."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


class _Store:
    """Copies inputs to the CPU; what stays the same from step to step (text embeddings, ids) is kept once."""

    # Two branches of guidance alternate, so the copy before the last one may be the one that is repeated.
    _REMEMBERED = 4

    def __init__(self) -> None:
        self._recent: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def keep(self, value: Any) -> Any:
        return map_tensors(value, self._keep_tensor)

    def _keep_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.detach().cpu().clone()
        recent = self._recent.setdefault((copy.shape, copy.dtype), [])
        for known in recent:
            if torch.equal(known, copy):
                return known
        recent.append(copy)
        del recent[: -self._REMEMBERED]
        return copy


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it replaced, inside dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value
