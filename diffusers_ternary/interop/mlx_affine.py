# SPDX-License-Identifier: Apache-2.0
"""MLX's affine quantization of packed weights: `scales * q + biases` in groups, exact for ternary and int8 codes.

A ternary group has q = code + 1 in 2 bits and biases = -scales, so that a weight is -s, 0 or s; an int8 row has
q = code + 128 in 8 bits and biases = -128 * scales. MLX's own quantizer finds other scales: a third of the weights
would change.
"""

import dataclasses

import torch

from ..format import LayerSpec, TernarySpec
from .export import four_in_a_byte, more_than_codes


GROUP_SIZES = (128, 64, 32)  # that MLX knows; a larger group is stored as several with the same scale


@dataclasses.dataclass(frozen=True)
class AffineWeight:
    """A weight as MLX stores it.

    Args:
        weight (`torch.Tensor`): int32 `[N, K * bits / 32]`, the bit patterns of uint32 words; column j of a word is in
            the bits from `bits * j` on.
        scales, biases (`torch.Tensor`): `[N, K / group_size]`, of one floating dtype.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor


def affine_group_size(spec: LayerSpec) -> int | None:
    """The largest of MLX's groups that lies inside those of a layer; `None` if there is none, or none is exact."""
    if more_than_codes(spec):
        return None
    group = spec.group_size if isinstance(spec, TernarySpec) and spec.groups > 1 else spec.in_features
    fitting = (size for size in GROUP_SIZES if spec.in_features % size == 0 and group % size == 0)
    return next(fitting, None)


def encode_affine(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> AffineWeight:
    """Packs codes.

    Args:
        codes (`torch.Tensor`): int8 `[N, K]`: -1, 0, 1 with 2 bits, -127 ... 127 with 8.
        scales (`torch.Tensor`): float32 `[N, K / group_size]`, stored in the narrowest dtype that holds all of them.
        bits (`int`): 2 or 8.
    """
    shift = 1 if bits == 2 else 128
    # The bytes of little-endian words.
    data = four_in_a_byte(codes) if bits == 2 else codes.view(torch.uint8) ^ 0x80
    words = data.view(torch.int32)
    dtype = narrowest(scales)
    stored = scales.to(dtype)
    return AffineWeight(words, stored, -shift * stored)


def narrowest(scales: torch.Tensor) -> torch.dtype:
    """bfloat16, in which mflux computes, if it holds all scales; else float16, else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return dtype
    return torch.float32
