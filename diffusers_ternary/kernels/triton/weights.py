# SPDX-License-Identifier: Apache-2.0
"""The packed weight as the kernels take it."""

import dataclasses
import functools

import torch


@functools.lru_cache(maxsize=4096)
def group_mode(in_features: int, group_size: int, block_k: int) -> int:
    """How scales vary over blocks of `block_k` bytes of a row: 1 = one per block and plane, 2 = one per element."""
    width = -(-in_features // 4)
    for plane in range(0, 4 * width, width):
        for first in range(plane, plane + width, block_k):
            last = min(first + block_k, plane + width, in_features) - 1
            if last > first and last // group_size != first // group_size:
                return 2
    return 1


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Packed codes and their scales.

    Args:
        packed (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; any float dtype; not negative.
        multiplier (`torch.Tensor`, *optional*): int8 `[N, G]`, values 0..63.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        hadamard (`int`): block size of the rotation of the activations that the codes were made for; 0 = none.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    in_features: int
    group_size: int
    hadamard: int = 0

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]

    @property
    def plane_width(self) -> int:
        """KP, the bytes per row."""
        return self.packed.shape[1]

    @property
    def groups(self) -> int:
        """G, the scales per row."""
        return -(-self.in_features // self.group_size)

    @property
    def per_row(self) -> bool:
        """Whether a row has one scale and no multiplier, so that the epilogue can apply it."""
        return self.multiplier is None and self.groups == 1

    @property
    def layout(self) -> tuple[object, ...]:
        """What the code of kernels depends on: sizes along K, dtypes, and the alignment of N."""
        scale = (self.group_size, self.scale.dtype, self.multiplier is None)
        return (self.in_features, self.hadamard, self.out_features % 16 == 0, *scale)

    def group_mode(self, block_k: int) -> int:
        """See [`group_mode`]."""
        return group_mode(self.in_features, self.group_size, block_k)
