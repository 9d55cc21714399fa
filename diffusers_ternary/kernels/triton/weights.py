# SPDX-License-Identifier: Apache-2.0
"""The packed weight as the kernels take it."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Packed codes and their scales.

    Args:
        packed (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; any float dtype; not negative.
        multiplier (`torch.Tensor`, *optional*): int8 `[N, G]`, values 0..63.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    in_features: int
    group_size: int

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

    def group_mode(self, block_k: int) -> int:
        """How scales vary over blocks of `block_k` bytes: 1 = one scale per row and block, 2 = one per element."""
        if self.groups == 1 or (self.group_size % block_k == 0 and self.plane_width % block_k == 0):
            return 1
        return 2
