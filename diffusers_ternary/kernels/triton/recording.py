# SPDX-License-Identifier: Apache-2.0
"""A product's launches and buffers written down while they happen, to be repeated without working them out again.

`launch` is the one description of how kernels are launched. What it does for a plan depends on shapes, dtypes and
alignment only, so the second call of a layer repeats the first one with other addresses. Triton's own launch takes 10
to 20 us of host time (binding and specializing arguments, looking up the compiled kernel); launching what it returned
takes 2.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are multiples of it
_BLOCK = 512  # of the caching allocator: where each buffer begins within the scratch


class _Slot(NamedTuple):
    """Stands for a tensor among recorded arguments."""

    number: int


class _Buffer(NamedTuple):
    """An allocation, in the shape that calls of torch see it in; kernels see its address."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool
    bytes: int


class _Step(NamedTuple):
    """One call: `function(*arguments)` with tensors in place of slots; its result becomes a slot if it is one."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: int | None
    compiled: Any = None  # of a kernel: what Triton's own launch returned
    grid: tuple[int, int, int] = (1, 1, 1)


_recording: contextvars.ContextVar["Recording | None"] = contextvars.ContextVar("recording", default=None)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, noted while a recording is on."""
    compiled = kernel[tuple(grid)](*arguments, **options)
    recording = _recording.get()
    if recording is not None:
        recording.launched(kernel, compiled, grid, arguments, options)


def buffer(*shape: int, dtype: torch.dtype, device: torch.device, zeros: bool = False) -> torch.Tensor:
    """Memory for a step, freed with the call; noted while a recording is on."""
    allocate = torch.zeros if zeros else torch.empty
    tensor = allocate(shape, dtype=dtype, device=device)
    recording = _recording.get()
    if recording is not None:
        recording.allocated(tensor, zeros)
    return tensor


def library(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """`function(*arguments)`, a call of torch that returns a new tensor; noted while a recording is on."""
    result = function(*arguments)
    recording = _recording.get()
    if recording is not None:
        recording.called(function, arguments, result)
    return result


class Recording:
    """What happened during a call.

    Args:
        inputs (`Sequence[torch.Tensor | None]`): the tensors that another call has others of, in its order.
    """

    def __init__(self, inputs: Sequence[torch.Tensor | None]) -> None:
        self.steps: list[_Step] = []
        self.buffers: dict[int, _Buffer] = {}
        self.inputs = len(inputs)
        # The tensors are kept so that no other takes their identity.
        self._kept: list[torch.Tensor | None] = list(inputs)
        self._slots = {id(tensor): index for index, tensor in enumerate(inputs) if tensor is not None}
        self.count = len(inputs)  # of slots
        self._storages: dict[int, int] = {}
        self._viewed: set[int] = set()
        self._complete = True

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Notes what happens inside."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def slot_of(self, tensor: torch.Tensor) -> int | None:
        """Number of an input, buffer or result; `None` for a tensor that came from elsewhere."""
        return self._slots.get(id(tensor))

    def _add(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        self._slots[id(tensor)] = self.count
        self.count += 1
        return self.count - 1

    def _with_slots(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(self._with_slot(argument) for argument in arguments)

    def _with_slot(self, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        index = self.slot_of(argument)
        if index is None:
            index = self._slot_of_view(argument)
        if index is None:
            # A tensor that nothing above accounts for: the call cannot be repeated.
            self._complete = False
            return argument
        return _Slot(index)

    def _slot_of_view(self, view: torch.Tensor) -> int | None:
        """Number of the buffer that this is all of, in another shape or dtype; it is allocated like that next time."""
        index = self._storages.get(view.untyped_storage().data_ptr())
        if index is None or view.nbytes != self.buffers[index].bytes or index in self._viewed:
            return None
        self._viewed.add(index)
        before = self.buffers[index]
        self.buffers[index] = before._replace(shape=tuple(view.shape), stride=view.stride(), dtype=view.dtype)
        self._slots[id(view)] = index
        self._kept.append(view)
        return index

    def allocated(self, tensor: torch.Tensor, zeros: bool) -> None:
        """Notes a buffer."""
        index = self._add(tensor)
        self.buffers[index] = _Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype, zeros, tensor.nbytes)
        self._storages[tensor.untyped_storage().data_ptr()] = index

    def called(self, function: Callable[..., Any], arguments: Sequence[Any], result: torch.Tensor) -> None:
        """Notes a call of torch."""
        arguments = self._with_slots(arguments)
        self.steps.append(_Step(function, arguments, self._add(result)))

    def launched(
        self, kernel: Any, compiled: Any, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        """Notes a launch; `compiled` is `None` under Triton's interpreter, where the kernel itself is called again."""
        noted = self._with_slots(arguments)
        first, second, third = (*grid, 1, 1)[:3]
        if compiled is None:
            noted_options = dict(options)

            def call(*values: Any) -> None:
                kernel[first, second, third](*values, **noted_options)

            self.steps.append(_Step(call, noted, None))
            return
        # Triton hands the compiled kernel every argument, constants too, in the order of the signature.
        named = [options[name] for name in kernel.arg_names[len(noted) :]]
        grid_3d = (first, second, third)
        self.steps.append(_Step(compiled[grid_3d], (*noted, *named), None, compiled, grid_3d))

    def replay(self, result: torch.Tensor, shape: tuple[int, ...]) -> "Replay | None":
        """What repeats the call, or `None` if something happened that was not noted.

        Args:
            result (`torch.Tensor`): what the call returned.
            shape (`tuple[int, ...]`): that repetitions return it in.
        """
        index = self.slot_of(result)
        return Replay(self, index, shape) if self._complete and self.steps and index is not None else None


class Replay:
    """Repeats a recording with other inputs.

    Args:
        recording ([`Recording`]): complete.
        result (`int`): slot of the tensor to return.
        shape (`tuple[int, ...]`): of the tensor to return, as many elements as it was recorded with.
    """

    def __init__(self, recording: Recording, result: int, shape: tuple[int, ...]) -> None:
        self._result, self._shape = result, shape
        self._steps, self._buffers = recording.steps, recording.buffers
        self._dtype = recording.buffers[result].dtype if result in recording.buffers else None
        # With kernels alone, addresses are all that is needed: one allocation holds all buffers.
        self.by_address = all(step.compiled is not None for step in self._steps) and not any(
            each.zeros for each in self._buffers.values()
        )
        # Kernels read packed weights by address; calls of torch, and interpreted kernels, need the tensors.
        self.reads_tensors = {
            argument.number
            for step in self._steps
            if step.compiled is None
            for argument in step.arguments
            if isinstance(argument, _Slot)
        }
        offset, self._offsets = 0, []
        if self.by_address:
            for index, each in self._buffers.items():
                if index != result:
                    self._offsets.append((index, offset))
                    offset += -(-each.bytes // _BLOCK) * _BLOCK
        self._scratch_bytes = offset
        self._blank = [None] * (recording.count - recording.inputs)
        self._launches = [
            (
                step.function,
                [None if isinstance(argument, _Slot) else argument for argument in step.arguments],
                [(i, argument.number) for i, argument in enumerate(step.arguments) if isinstance(argument, _Slot)],
                step.result,
                step.compiled is not None,
            )
            for step in self._steps
        ]

    def __call__(self, inputs: Sequence[torch.Tensor | None], addresses: Sequence[int], stream: int) -> torch.Tensor:
        """The result for other inputs.

        Args:
            inputs (`Sequence`): as the recording's; a call of torch gets them as they are here.
            addresses (`Sequence[int]`): of the inputs' data, 0 for `None`.
            stream (`int`): handle of the stream to launch on.
        """
        x = inputs[0]
        assert x is not None
        return (
            self._by_address(x, addresses, stream)
            if self.by_address
            else self._by_tensor(x, inputs, addresses, stream)
        )

    def _by_address(self, x: torch.Tensor, addresses: Sequence[int], stream: int) -> torch.Tensor:
        y = x.new_empty(*self._shape) if self._dtype is x.dtype else x.new_empty(*self._shape, dtype=self._dtype)
        values: list[Any] = [*addresses, *self._blank]
        values[self._result] = y.data_ptr()
        if self._scratch_bytes:
            scratch = x.new_empty(self._scratch_bytes, dtype=torch.int8)
            base = scratch.data_ptr()
            for index, offset in self._offsets:
                values[index] = base + offset
        for function, arguments, slots, _, _ in self._launches:
            filled = arguments.copy()
            for position, index in slots:
                filled[position] = values[index]
            function(*filled, stream=stream)
        return y

    def _by_tensor(
        self, x: torch.Tensor, inputs: Sequence[torch.Tensor | None], addresses: Sequence[int], stream: int
    ) -> torch.Tensor:
        tensors: list[Any] = [*inputs, *self._blank]
        values: list[Any] = [*addresses, *self._blank]
        device = x.device
        for index, (shape, stride, dtype, zeros, _) in self._buffers.items():
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            if zeros:
                tensor.zero_()
            tensors[index], values[index] = tensor, tensor.data_ptr()
        for function, arguments, slots, result, is_kernel in self._launches:
            filled = arguments.copy()
            for position, index in slots:
                filled[position] = values[index] if is_kernel else tensors[index]
            if is_kernel:
                function(*filled, stream=stream)
                continue
            value = function(*filled)
            if result is not None:
                tensors[result], values[result] = value, value.data_ptr()
        y: torch.Tensor = tensors[self._result]
        return y if y.shape == self._shape else y.view(self._shape)
