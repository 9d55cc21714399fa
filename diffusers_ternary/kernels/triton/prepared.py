# SPDX-License-Identifier: Apache-2.0
"""A prepared call: the first one chooses a plan, measures if need be, and records; the others repeat its launches."""

import contextlib
import math

import torch
from triton.runtime import driver

from .devices import current, is_capturing
from .product import decide, run
from .recording import ALIGNMENT, Recording, Replay
from .weights import Layout, PackedWeight


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
_PACKED = {1, 2, 3}  # places of weight, scale and multiplier among the inputs


class PreparedCall:
    """`rotate(x) @ W.T + bias` for inputs of one shape on one device.

    It holds compiled kernels, grids, sizes of buffers and the arguments that stay, and no tensor: weights may move
    between calls. Buffers are allocated in each call, which is what streams and CUDA graphs need.
    """

    def __init__(self, shape: torch.Size, device: torch.device, layout: Layout) -> None:
        self._tokens, self._layout = math.prod(shape[:-1]), layout
        self._out_shape = (*shape[:-1], layout.out_features)
        self._device, self._index = device, device.index or 0
        # With one device, the right one is current.
        self._one_device = device.type == "cpu" or torch.get_device_module(device.type).device_count() == 1
        self._replay: Replay | None = None

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The product.

        Args:
            x (`torch.Tensor`): of the shape that this was prepared for.
            weight, scale, multiplier, bias (`torch.Tensor`): as in `linear`, contiguous, on the device of `x`; the
                scale may be its bit pattern.
        """
        if not x.is_contiguous():
            x = x.contiguous()
        address = x.data_ptr()
        addresses = (
            address,
            weight.data_ptr(),
            scale.data_ptr(),
            0 if multiplier is None else multiplier.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        replay = self._replay
        aligned = (address | addresses[1] | addresses[2] | addresses[3] | addresses[4]) % ALIGNMENT == 0
        if replay is None or not aligned:
            return self._first(self._views(x, weight, scale, multiplier, bias), record=aligned)
        if replay.reads_tensors.isdisjoint(_PACKED):
            inputs: tuple[torch.Tensor | None, ...] = (x, None, None, None, bias)
        else:
            inputs = self._views(x, weight, scale, multiplier, bias)
        if self._one_device:
            return replay(inputs, addresses, _stream(self._index))
        with current(self._device):
            return replay(inputs, addresses, _stream(self._index))

    def _views(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> _Inputs:
        """The tensors as `run` takes them; what is recorded names them by their place."""
        return (
            x.view(self._tokens, self._layout.in_features),
            weight.detach(),
            scale.detach().view(self._layout.scale_dtype),
            None if multiplier is None else multiplier.detach().view(torch.int8),
            bias,
        )

    def _first(self, inputs: _Inputs, *, record: bool) -> torch.Tensor:
        tokens, codes, scales, multiplier, bias = inputs
        layout = self._layout
        weight = PackedWeight(codes, scales, multiplier, layout.in_features, layout.group_size, layout.hadamard)
        # While a graph is captured nothing can be measured, and the plan may not be the one to stay with.
        recording = Recording(inputs) if record and not is_capturing(self._device) else None
        with current(self._device):
            plan, activation_dtype, target = decide(tokens, weight, bias, layout.activation_dtype)
            with contextlib.nullcontext() if recording is None else recording.on():
                y = run(plan, tokens, weight, bias, activation_dtype, target)
        if recording is not None:
            self._replay = recording.replay(y, self._out_shape)
        return y.view(self._out_shape)


def _stream(index: int) -> int:
    with contextlib.suppress(RuntimeError):  # the interpreter needs no driver
        return driver.active.get_current_stream(index)
    return 0
