# SPDX-License-Identifier: Apache-2.0
"""A prepared call: the first one chooses a plan, measures if need be, and records; the others repeat its launches."""

import contextlib
import math

import torch
from triton.runtime import driver

from .devices import current, is_capturing
from .product import decide, run
from .recording import ALIGNMENT, Recording, Replay
from .weights import PackedWeight


_PACKED = {1, 2, 3}  # places of weight, scale and multiplier among the inputs


class PreparedCall:
    """`rotate(x) @ W.T + bias` for inputs of one shape on one device; arguments of the constructor as in `linear`.

    It holds compiled kernels, grids, sizes of buffers and the arguments that stay, and no tensor: weights may move
    between calls. Buffers are allocated in each call, which is what streams and CUDA graphs need.
    """

    def __init__(
        self,
        shape: torch.Size,
        device: torch.device,
        *,
        out_features: int,
        in_features: int,
        group_size: int,
        scale_dtype: torch.dtype,
        activation_dtype: str,
        hadamard: int,
    ) -> None:
        self._rows, self._in_features = math.prod(shape[:-1]), in_features
        self._out_shape = (*shape[:-1], out_features)
        self._group_size, self._hadamard = group_size, hadamard
        self._scale_dtype, self._activation_dtype = scale_dtype, activation_dtype
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
            return self._first(x, weight, scale, multiplier, bias, record=aligned)
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The tensors as `run` takes them; what is recorded names them by their place."""
        return (
            x.view(self._rows, self._in_features),
            weight.detach(),
            scale.detach().view(self._scale_dtype),
            None if multiplier is None else multiplier.detach().view(torch.int8),
            bias,
        )

    def _first(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        record: bool,
    ) -> torch.Tensor:
        tokens, codes, scales, factors, _ = inputs = self._views(x, weight, scale, multiplier, bias)
        packed = PackedWeight(codes, scales, factors, self._in_features, self._group_size, self._hadamard)
        # While a graph is captured nothing can be measured, and the plan may not be the one to stay with.
        recording = Recording(inputs) if record and not is_capturing(self._device) else None
        with current(self._device):
            plan, activation_dtype, target = decide(tokens, packed, bias, self._activation_dtype)
            with contextlib.nullcontext() if recording is None else recording.on():
                y = run(plan, tokens, packed, bias, activation_dtype, target)
        if recording is not None:
            self._replay = recording.replay(y, self._out_shape)
        return y.view(self._out_shape)


def _stream(index: int) -> int:
    with contextlib.suppress(RuntimeError):  # the interpreter needs no driver
        return driver.active.get_current_stream(index)
    return 0
