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
from ..operands import Call, Layout
from .serving import TRITON_DEVICE_TYPES, triton_serves


Prepare = Callable[[Layout, torch.Size, torch.dtype, torch.device], Call | None]

MAX_CALLS = 256  # shapes of the input that a layout remembers; text of ever new lengths starts over


def _prepare_triton(layout: Layout, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call | None:
    if not triton_serves(device):
        return None
    from .. import triton as kernels

    return kernels.prepare(
        shape,
        dtype,
        device,
        out_features=layout.out_features,
        in_features=layout.in_features,
        group_size=layout.group_size,
        scale_dtype=layout.scale_dtype,
        activation_dtype=layout.activation_dtype,
        hadamard=layout.hadamard,
    )


# A device that is not named here has no quick way, and the operator serves it.
_PREPARE: dict[str, Prepare] = {"cpu": cpu.prepare, **dict.fromkeys(TRITON_DEVICE_TYPES, _prepare_triton)}


class PreparedProducts:
    """The prepared calls of one [`Layout`], by shape, dtype and device of the input; made by [`prepared_products`]."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._calls: dict[tuple[torch.Size, torch.dtype, torch.device], Call | None] = {}

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
        device = x.device
        if not self.layout.fits(device, weight, scale, multiplier, bias):
            return None
        key = (x.shape, x.dtype, device)
        try:
            call = self._calls[key]
        except KeyError:
            call = self._prepare(*key)
        return None if call is None else call(x, weight, scale, multiplier, bias)

    def _prepare(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call | None:
        layout = self.layout
        call = None
        if len(shape) > 0 and shape[-1] == layout.in_features and shape.numel() > 0:
            prepare = _PREPARE.get(device.type)
            call = None if prepare is None else prepare(layout, shape, dtype, device)
        if len(self._calls) >= MAX_CALLS:
            self._calls.clear()
        self._calls[shape, dtype, device] = call
        return call


@functools.lru_cache(maxsize=4096)
def prepared_products(layout: Layout) -> PreparedProducts:
    """The prepared calls of a layout; layers of one layout share them."""
    return PreparedProducts(layout)


def quick_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int,
) -> torch.Tensor | None:
    """The operator's own way to a prepared call, for compiled graphs; `None` where there is none."""
    if not is_plain(input):
        return None
    products = _products_of(
        weight.shape[0],
        in_features,
        group_size,
        scale.dtype,
        multiplier is not None,
        None if bias is None else bias.dtype,
        activation_dtype,
        hadamard,
    )
    return products(input, weight, scale, multiplier, bias)


@functools.lru_cache(maxsize=4096)
def _products_of(*fields: object) -> PreparedProducts:
    return prepared_products(Layout(*fields))  # type: ignore[arg-type]
