# SPDX-License-Identifier: Apache-2.0
"""Ternary weights that are unpacked once and stay so: four times the memory, and no unpacking in each call."""

from collections.abc import Callable

import torch

from ..compat import is_plain
from ..operands import PackedWeight
from .serving import TRITON_DEVICE_TYPES, triton_serves


def _nothing() -> None:
    """What copies and pickles of a resident weight are: the packed one is all that a layer must keep."""


class ResidentWeight:
    """The 8-bit weight of one layer on a GPU.

    Args:
        product (`Callable`): see [`kernels.triton.unpacked`].
        sources (`tuple[torch.Tensor, ...]`): packed tensors that it was made of; changed in place, they make it stale.
        nbytes (`int`): its memory.
    """

    def __init__(
        self,
        product: Callable[[torch.Tensor, torch.Tensor | None, str], torch.Tensor | None],
        sources: tuple[torch.Tensor | None, ...],
        nbytes: int,
    ) -> None:
        self.nbytes = nbytes
        self._product = product
        self._made_of = _versions(sources)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def __call__(
        self,
        x: torch.Tensor,
        sources: tuple[torch.Tensor | None, ...],
        bias: torch.Tensor | None,
        activation_dtype: str,
    ) -> torch.Tensor | None:
        """`x @ W.T + bias`, or `None` where the packed weight must serve."""
        if not is_plain(x) or (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
            return None
        return self._product(x, bias, activation_dtype) if _versions(sources) == self._made_of else None


def _versions(tensors: tuple[torch.Tensor | None, ...]) -> tuple[object, ...]:
    return tuple(None if t is None or t.is_inference() else (t.device, t._version) for t in tensors)


def unpacked_bytes(out_features: int, in_features: int) -> int:
    """Memory of a resident weight: a byte for each element of rows of whole blocks, and a float32 scale for each."""
    return out_features * (-(-in_features // 128) * 128 + 4)


def resident_weight(weight: PackedWeight, activation_dtype: str) -> ResidentWeight | None:
    """Unpacks a weight on its GPU; `None` where no 8-bit product serves it."""
    device = weight.packed.device
    if device.type not in TRITON_DEVICE_TYPES or not triton_serves(device):
        return None
    from .. import triton as kernels

    product = kernels.unpacked(weight.each(torch.Tensor.detach), activation_dtype)
    nbytes = unpacked_bytes(weight.out_features, weight.in_features)
    return None if product is None else ResidentWeight(product, weight.tensors, nbytes)
