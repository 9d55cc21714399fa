# SPDX-License-Identifier: Apache-2.0
"""Moments of the inputs of layers, gathered by hooks while the pipeline runs."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..layers import FLOAT_TYPES, FloatLayer, input_rows, matrix_shape
from ..rollouts import Rollouts, timestep_of
from .hessian import InputMoments, ReferenceMoments


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """Layers of one model that are always called with the same tensor (q, k and v), and so share their moments.

    Args:
        layers (`tuple[str, ...]`): module names, in the order of their calls.
        in_features (`int`): K, of the layers' matrices.
        out_features (`tuple[int, ...]`, *optional*): N of each, where second moments of the outputs' gradients are
            gathered too.
        reference (`bool`): whether moments with the inputs of the float model are gathered too.
    """

    layers: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...] = ()
    reference: bool = False

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of the moments, and of the outputs' where these are gathered."""
        inputs = (1 + self.reference) * (self.in_features + 1) * self.in_features
        return (inputs + sum(rows * rows for rows in self.out_features)) * dtype.itemsize


class GroupFinder:
    """Context manager: finds the layers that share their input in the forwards inside.

    No activation is kept alive: an input is remembered by weak reference, and layers that share it are called while
    it lives.

    Args:
        model (`nn.Module`): the denoiser.
        layers (`Sequence[str]`): linear layers and convolutions to watch.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._layers = list(layers)
        self._live: list[tuple[weakref.ref[torch.Tensor], int, int]] = []  # input, version, number
        self._numbers = 0
        self._seen: dict[str, list[int]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "GroupFinder":
        for name in self._layers:
            handle = self._model.get_submodule(name).register_forward_pre_hook(self._observer(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _observer(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Convolutions stand alone: the same image under another kernel is another input.
            number = self._identify(args[0]) if isinstance(module, nn.Linear) else self._new_number()
            self._seen.setdefault(name, []).append(number)

        return observe

    def _identify(self, x: torch.Tensor) -> int:
        version = 0 if x.is_inference() else x._version
        self._live = [entry for entry in self._live if entry[0]() is not None]
        for reference, known, number in self._live:
            if reference() is x and known == version:
                return number
        number = self._new_number()
        self._live.append((weakref.ref(x), version, number))
        return number

    def _new_number(self) -> int:
        self._numbers += 1
        return self._numbers - 1

    def groups(self) -> list[InputGroup]:
        """The groups, in the order of their first call. Layers that were never called stand alone, at the end."""
        members: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in self._seen.items():
            members.setdefault(tuple(inputs), []).append(name)
        names = [*members.values(), *([name] for name in self._layers if name not in self._seen)]
        return [InputGroup(tuple(part), matrix_shape(self._layer(part[0]))[1]) for part in names]

    def _layer(self, name: str) -> FloatLayer:
        module = self._model.get_submodule(name)
        assert isinstance(module, FLOAT_TYPES)
        return module


class MomentCollector:
    """Context manager: sums x xᵀ and x over every call of the layers, on the layers' device.

    Image and text tokens, all steps and all guidance branches count alike, one per row of x; so does every patch
    under the kernel of a convolution.

    Args:
        model (`nn.Module`): the denoiser; its calls are counted as steps for messages.
        groups (`Sequence[InputGroup]`): what to gather; the first layer of a group is hooked.
        dtype (`torch.dtype`): float32 or float64, of products and sums.
        reference (`Callable[[], AbstractContextManager]`, *optional*): makes the model the float model inside. Each
            call is made twice then, and moments with the inputs of the float model are gathered too.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[InputGroup],
        *,
        dtype: torch.dtype = torch.float32,
        reference: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._reference = reference
        self._recording = False
        self._expected: dict[str, list[torch.Tensor]] = {}  # inputs of the float model, not used yet
        self._cross: dict[str, torch.Tensor] = {}
        self._expected_first: dict[str, torch.Tensor] = {}
        self._model = model
        self._groups = list(groups)
        self._dtype = dtype
        self._second: dict[str, torch.Tensor] = {}
        self._first: dict[str, torch.Tensor] = {}
        self._count: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._calls = 0
        self._inside = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "MomentCollector":
        for group in self._groups:
            leader = group.layers[0]
            handle = self._model.get_submodule(leader).register_forward_pre_hook(self._observer(leader))
            self._stack.callback(handle.remove)
        begin = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._stack.callback(begin.remove)
        # First of all hooks: a backward in another one may compute activations again, and their inputs do not count.
        end = self._model.register_forward_hook(self._check, with_kwargs=True, prepend=True)
        self._stack.callback(end.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _observer(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, FLOAT_TYPES)
            if self._inside:
                self._add(name, input_rows(module, args[0].detach()).to(self._dtype))

        return observe

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        if self._reference is not None:
            with self._reference(), torch.no_grad():
                self._recording = True
                module.forward(*args, **kwargs)
                self._recording = False

    @torch.no_grad()
    def _add(self, name: str, rows: torch.Tensor) -> None:
        if self._recording:
            self._expected.setdefault(name, []).append(rows)
            return
        if name not in self._second:
            size = rows.shape[1]
            self._second[name] = torch.zeros(size, size, dtype=self._dtype, device=rows.device)
            self._first[name] = torch.zeros(size, dtype=self._dtype, device=rows.device)
        total = rows.sum(dim=0)
        self._second[name].addmm_(rows.T, rows)
        self._first[name] += total
        self._count[name] = self._count.get(name, 0) + rows.shape[0]
        if self._reference is not None:
            expected = self._expected[name].pop(0)
            if name not in self._cross:
                self._cross[name] = torch.zeros_like(self._second[name])
                self._expected_first[name] = torch.zeros_like(self._first[name])
            self._cross[name].addmm_(rows.T, expected)
            self._expected_first[name] += expected.sum(dim=0)
        self._sums[name] = total.sum()

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._inside = False
        # One look per denoiser call, not one per layer: on a GPU each look waits for the device.
        if self._sums:
            names = list(self._sums)
            finite = torch.isfinite(torch.stack([self._sums[name] for name in names])).tolist()
            bad = next((name for name, good in zip(names, finite, strict=True) if not good), None)
            if bad is not None:
                raise ValueError(
                    f"{bad}: its input holds NaN or Inf {_step(module, args, kwargs)}(denoiser call {self._calls}, "
                    "counted from 0 over all prompts, steps and guidance branches). Load the pipeline in bfloat16 or "
                    "float32 instead of float16, and check that it draws images."
                )
            self._sums.clear()
        self._calls += 1

    def moments(self) -> dict[str, InputMoments]:
        """Moments by the name of each group's first layer. Layers that were never called have zeros and count 0."""
        return {group.layers[0]: self._moments_of(group) for group in self._groups}

    def _moments_of(self, group: InputGroup) -> InputMoments:
        name = group.layers[0]
        count = self._count.get(name, 0)
        if count == 0:
            weight = self._model.get_parameter(f"{name}.weight")
            zeros = torch.zeros(group.in_features, dtype=self._dtype, device=weight.device)
            return InputMoments(zeros.expand(group.in_features, -1).clone(), zeros, 0)
        reference = None
        if self._reference is not None:
            reference = ReferenceMoments(self._cross[name] / count, self._expected_first[name] / count)
        return InputMoments(self._second[name] / count, self._first[name] / count, count, reference)


def _step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    try:
        return f"at timestep {timestep_of(model, args, kwargs):g} "
    except ValueError:
        return ""  # a model that is called without one


def find_groups(
    pipeline: DiffusionPipeline, model: nn.Module, layers: Sequence[str], rollouts: Rollouts
) -> list[InputGroup]:
    """The groups of a denoiser's layers, from the first prompt."""
    with GroupFinder(model, layers) as finder:
        rollouts.first(1).run(pipeline, description="Finding shared inputs")
    return finder.groups()


def collect_moments(
    pipeline: DiffusionPipeline,
    model: nn.Module,
    groups: Sequence[InputGroup],
    rollouts: Rollouts,
    *,
    dtype: torch.dtype,
    reference: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    description: str = "Gathering statistics",
) -> dict[str, InputMoments]:
    """The moments of a denoiser's layers over all prompts, by the name of each group's first layer."""
    with MomentCollector(model, groups, dtype=dtype, reference=reference) as collector:
        rollouts.run(pipeline, description=description)
    return collector.moments()


def split_passes(groups: Iterable[InputGroup], *, limit: int | None, dtype: torch.dtype) -> list[list[InputGroup]]:
    """Splits the groups into passes over the rollouts whose moments fit into `limit` bytes.

    Raises:
        ValueError: if a single group is larger than the limit.
    """
    passes: list[list[InputGroup]] = [[]]
    used = 0
    for group in groups:
        size = group.bytes(dtype)
        if limit is not None and size > limit:
            raise ValueError(
                f"{group.layers[0]}: the statistics of its {group.in_features} inputs take {size / 2**20:,.0f} MiB, "
                f"more than memory_limit={limit / 2**20:,.0f} MiB. Raise memory_limit"
                + (", or accumulate in float32." if dtype == torch.float64 else ", or keep the layer.")
            )
        if limit is not None and used + size > limit:
            passes.append([])
            used = 0
        passes[-1].append(group)
        used += size
    return [part for part in passes if part]
