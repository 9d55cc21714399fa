# SPDX-License-Identifier: Apache-2.0
"""The packed weight as every kernel takes it, and what is known of it before it is in memory.

It is defined here because this folder stands alone; the other kernels import it from `kernels.operands`.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch


FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of scales and biases


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
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`, values 0..63; int8 for the Triton kernels.
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
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scale and multiplier."""
        return self.packed, self.scale, self.multiplier

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

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedWeight":
        """The weight with every tensor changed in the same way."""
        multiplier = None if self.multiplier is None else change(self.multiplier)
        return dataclasses.replace(self, packed=change(self.packed), scale=change(self.scale), multiplier=multiplier)

    def part(self, first: int, last: int) -> "PackedWeight":
        """The output features `[first, last)`."""
        return self.each(lambda tensor: tensor[first:last])

    def contiguous(self) -> "PackedWeight":
        """The same weight, as code that reads addresses needs it."""
        return self.each(torch.Tensor.contiguous)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same weight on a device."""
        return self.each(lambda tensor: tensor.to(device))

    def check(self, bias: torch.Tensor | None) -> None:
        """Checks everything that compiled code reads by address.

        Raises:
            ValueError: names the tensor, its shape and what is expected.
        """
        n, groups = self.out_features, self.groups
        expected = (
            ("weight", self.packed, (n, -(-self.in_features // 4)), (torch.int8,)),
            ("scale", self.scale, (n, groups if self.multiplier is None else 1), FLOAT_DTYPES),
            ("multiplier", self.multiplier, (n, groups), (torch.uint8,)),
            ("bias", bias, (n,), FLOAT_DTYPES),
        )
        for name, tensor, shape, dtypes in expected:
            if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; in_features={self.in_features} and "
                    f"group_size={self.group_size} need {list(shape)} of {' or '.join(map(str, dtypes))}."
                )

    def group_mode(self, block_k: int) -> int:
        """See [`group_mode`]."""
        return group_mode(self.in_features, self.group_size, block_k)


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
        n, groups = self.out_features, self.groups
        return (
            n * -(-self.in_features // 4),
            n * (1 if self.has_multiplier else groups) * self.scale_dtype.itemsize,
            n * groups,
            n * (0 if self.bias_dtype is None else self.bias_dtype.itemsize),
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
