# SPDX-License-Identifier: Apache-2.0
"""How far the student's denoiser is from the teacher's, step by step, on the teacher's own trajectories."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


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


@dataclasses.dataclass(frozen=True)
class VelocityError:
    """Normalised mean squared error of the denoiser output: mean |v_s - v_t|^2 / mean |v_t|^2.

    Args:
        timesteps (`tuple[float, ...]`): of each step, as the denoiser receives it.
        per_step (`tuple[float, ...]`): of each step, over all prompts and guidance branches. NaN where the teacher's
            output is zero and the student's is not, and where an output is not finite.
        overall (`float`): over all steps.
        prompts (`int`): prompts whose trajectories were used.
        calls (`int`): denoiser calls that were compared.
    """

    timesteps: tuple[float, ...]
    per_step: tuple[float, ...]
    overall: float
    prompts: int
    calls: int


@contextlib.contextmanager
def recorded_calls(denoiser: nn.Module) -> Iterator[list[DenoiserCall]]:
    """Records the calls of a denoiser during one pipeline call. The hook is gone afterwards, whatever happens.

    Consecutive calls with the same timestep are one step: the branches of classifier-free guidance.

    Raises:
        ValueError: if the denoiser is called without a timestep.
    """
    calls: list[DenoiserCall] = []
    store = _Store()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        timestep = _timestep(module, args, kwargs)
        step = 0
        if calls:
            step = calls[-1].step + (calls[-1].timestep != timestep)
        calls.append(
            DenoiserCall(
                step, timestep, store.keep(args), store.keep(kwargs), _prediction(output).to("cpu", copy=True)
            )
        )

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def velocity_error(
    student: nn.Module, calls: Iterable[DenoiserCall], *, teacher_dtype: torch.dtype, prompts: int
) -> VelocityError:
    """Replays recorded calls through the student's denoiser.

    Args:
        student (`nn.Module`): of the teacher's architecture; called, not changed.
        calls (`Iterable[DenoiserCall]`): from [`recorded_calls`], of one or more pipeline calls.
        teacher_dtype (`torch.dtype`): inputs of this dtype are given to the student in its own.
        prompts (`int`): prompts behind the calls, for the record.
    """
    errors: dict[int, float] = {}
    norms: dict[int, float] = {}
    timesteps: dict[int, float] = {}
    count = 0
    for call in calls:
        place = _Place(_device(student), teacher_dtype, _dtype(student))
        expected = call.output.double()
        predicted = _prediction(student(*place.put(call.args), **place.put(call.kwargs))).cpu().double()
        errors[call.step] = errors.get(call.step, 0.0) + float((predicted - expected).square().sum())
        norms[call.step] = norms.get(call.step, 0.0) + float(expected.square().sum())
        timesteps.setdefault(call.step, call.timestep)
        count += 1
    steps = sorted(errors)
    return VelocityError(
        timesteps=tuple(timesteps[step] for step in steps),
        per_step=tuple(_ratio(errors[step], norms[step]) for step in steps),
        overall=_ratio(sum(errors.values()), sum(norms.values())),
        prompts=prompts,
        calls=count,
    )


def _ratio(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm else float("nan")


def _timestep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    value = kwargs.get("timestep")
    if value is None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        position = names.index("timestep") if "timestep" in names else len(args)
        value = args[position] if position < len(args) else None
    if value is None:
        raise ValueError(
            f"{type(module).__name__} is called without a timestep, so its error cannot be told per step. Pass "
            "velocity_prompts=0 to leave the velocity error out."
        )
    return float(value.flatten()[0]) if isinstance(value, torch.Tensor) else float(value)


def _prediction(output: Any) -> torch.Tensor:
    prediction = output[0]
    assert isinstance(prediction, torch.Tensor)
    return prediction.detach()


def _device(module: nn.Module) -> torch.device:
    device = next(module.parameters()).device
    # Sequentially offloaded modules move their inputs themselves.
    return torch.device("cpu") if device.type == "meta" else device


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


class _Store:
    """Copies inputs to the CPU; what stays the same from step to step (text embeddings, ids) is kept once."""

    # Two branches of guidance alternate, so the copy before the last one may be the one that is repeated.
    _REMEMBERED = 4

    def __init__(self) -> None:
        self._recent: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def keep(self, value: Any) -> Any:
        return _map_tensors(value, self._keep_tensor)

    def _keep_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.detach().cpu().clone()
        recent = self._recent.setdefault((copy.shape, copy.dtype), [])
        for known in recent:
            if torch.equal(known, copy):
                return known
        recent.append(copy)
        del recent[: -self._REMEMBERED]
        return copy


@dataclasses.dataclass(frozen=True)
class _Place:
    device: torch.device
    from_dtype: torch.dtype
    to_dtype: torch.dtype

    def put(self, value: Any) -> Any:
        return _map_tensors(value, self._put_tensor)

    def _put_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.to_dtype if tensor.dtype == self.from_dtype else tensor.dtype
        return tensor.to(self.device, dtype)


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
