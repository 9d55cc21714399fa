# SPDX-License-Identifier: Apache-2.0
"""Prepared calls: what a product needs is worked out once for each layout, shape and device, then only launched.

A forward pass calls hundreds of layers with the same shapes in every step. The operator costs more host time than
many of the kernels: dispatcher, checks, choice of a kernel, Triton's binding of arguments. A prepared call has all of
that behind it and takes tensors.
"""

import functools
from collections.abc import Callable

import torch

from .. import cpu
from ..compat import is_plain
from ..operands import Call, Layout, PackedWeight
from .serving import TRITON_DEVICE_TYPES, triton_serves


Prepare = Callable[[Layout, torch.Size, torch.dtype, torch.device], Call | None]

MAX_CALLS = 256  # shapes of the input that a layout remembers; text of ever new lengths starts over


def _prepare_triton(layout: Layout, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call | None:
    if not triton_serves(device):
        return None
    from .. import triton as kernels

    return kernels.prepare(shape, dtype, device, layout)


# A device that is not named here has no quick way, and the operator serves it.
_PREPARE: dict[str, Prepare] = {"cpu": cpu.prepare, **dict.fromkeys(TRITON_DEVICE_TYPES, _prepare_triton)}


class PreparedProducts:
    """The prepared calls of one [`Layout`], by shape, dtype and device of the input; made by [`prepared_products`]."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.calls: dict[tuple[torch.Size, torch.dtype, torch.device], Call | None] = {}

    def __reduce__(self) -> tuple[object, ...]:
        # Copies of a layer and pickles share or make anew: compiled kernels cannot travel.
        return prepared_products, (self.layout,)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`x @ W.T + bias`, or `None` where the operator must be called.

        Args:
            x (`torch.Tensor`): `[..., K]`.
            weight, scale, multiplier, bias (`torch.Tensor`): see [`ternary_linear`]; the scale may be its bit pattern.
        """
        call = self.find(x)
        if call is None or not self.layout.fits(x.device, weight, scale, multiplier, bias):
            return None
        return call(x, weight, scale, multiplier, bias)

    def find(self, x: torch.Tensor) -> Call | None:
        """The prepared call for an input, of `calls` or new; `None` where the operator must be called."""
        key = (x.shape, x.dtype, x.device)
        if key not in self.calls:
            if len(self.calls) >= MAX_CALLS:
                self.calls.clear()
            self.calls[key] = self._prepare(*key)
        return self.calls[key]

    def _prepare(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call | None:
        prepare = _PREPARE.get(device.type)
        if prepare is None or not shape or shape[-1] != self.layout.in_features or shape.numel() == 0:
            return None
        return prepare(self.layout, shape, dtype, device)


@functools.lru_cache(maxsize=4096)
def prepared_products(layout: Layout) -> PreparedProducts:
    """The prepared calls of a layout; layers of one layout share them."""
    return PreparedProducts(layout)


def quick_linear(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """The operator's own way to a prepared call, for compiled graphs; `None` where there is none."""
    if not is_plain(input):
        return None
    products = _products_of(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.scale.dtype,
        weight.multiplier is not None,
        None if bias is None else bias.dtype,
        activation_dtype,
        weight.hadamard,
    )
    return products(input, *weight.tensors, bias)


@functools.lru_cache(maxsize=4096)
def _products_of(*fields: object) -> PreparedProducts:
    return prepared_products(Layout(*fields))  # type: ignore[arg-type]
