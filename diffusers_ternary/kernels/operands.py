# SPDX-License-Identifier: Apache-2.0
"""What a ternary product depends on besides the values: checked once, and the key of everything prepared for it."""

import dataclasses
import functools
from collections.abc import Callable

import torch


# (input, weight, scale, multiplier, bias) -> output; the scale in its float dtype or as its bit pattern.
Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    torch.Tensor,
]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A packed ternary map without its tensors: layers of one shape and kind share it.

    It holds no tensor, so nothing that is prepared for it keeps the memory of offloaded weights alive, and moving or
    replacing parameters cannot make it stale: addresses are read in each call.

    Args:
        out_features, in_features (`int`): N, K.
        group_size (`int`): columns per scale.
        scale_dtype (`torch.dtype`): of the scales.
        has_multiplier (`bool`): whether the scale is `[N, 1]` with a multiplier `[N, G]`.
        bias_dtype (`torch.dtype`, *optional*): `None` without a bias.
        activation_dtype (`str`): what the activations are rounded to, see [`TernaryConfig`].
        hadamard (`int`): block size of the rotation of the input; 0 = none.
    """

    out_features: int
    in_features: int
    group_size: int
    scale_dtype: torch.dtype
    has_multiplier: bool
    bias_dtype: torch.dtype | None
    activation_dtype: str
    hadamard: int = 0

    @functools.cached_property
    def groups(self) -> int:
        """G, the scales per row."""
        return -(-self.in_features // self.group_size)

    @functools.cached_property
    def _bytes(self) -> tuple[int, int, int, int]:
        rows, groups = self.out_features, self.groups
        return (
            rows * -(-self.in_features // 4),
            rows * (1 if self.has_multiplier else groups) * self.scale_dtype.itemsize,
            rows * groups,
            rows * (0 if self.bias_dtype is None else self.bias_dtype.itemsize),
        )

    def fits(
        self,
        device: torch.device,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> bool:
        """Whether code that reads the tensors by address may: on the device, contiguous, and of the layout's size.

        Part of every call, so it asks for sizes in bytes and not for shapes; whoever it refuses is served by the
        operator, whose checks say what is wrong.
        """
        weight_bytes, scale_bytes, multiplier_bytes, bias_bytes = self._bytes
        return (
            weight.nbytes == weight_bytes
            and weight.device == device
            and weight.is_contiguous()
            and scale.nbytes == scale_bytes
            and scale.device == device
            and scale.is_contiguous()
            and (
                multiplier is None
                if not self.has_multiplier
                else multiplier is not None
                and multiplier.nbytes == multiplier_bytes
                and multiplier.device == device
                and multiplier.is_contiguous()
            )
            and (
                bias is None
                if self.bias_dtype is None
                else bias is not None
                and bias.dtype is self.bias_dtype
                and bias.nbytes == bias_bytes
                and bias.device == device
                and bias.is_contiguous()
            )
        )
