# SPDX-License-Identifier: Apache-2.0
"""The operators on GPUs: Triton's kernels, registered for CUDA, ROCm (`"cuda"` to torch as well) and XPU.

Where they cannot run the reference serves, and one line of the log says why. Triton is imported at the first call.
"""

import dataclasses

import torch

from ...ternarize import rotate
from .. import blocked, reference
from ..compat import returns_no_view
from ..operands import PackedWeight
from .linear_map import register_linear
from .rotate import ternary_rotate
from .schema import weight_kernel
from .serving import TRITON_DEVICE_TYPES, triton_serves
from .unpack import ternary_unpack


def _serve(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor:
    # Whoever asks for float64 wants exact numbers (gradient checks), not speed.
    if input.dtype == torch.float64 or not triton_serves(input.device):
        return blocked.linear(input, weight, bias, activation_dtype)
    from .. import triton as kernels

    if weight.hadamard > kernels.MAX_HADAMARD:
        input, weight = rotate(input, weight.hadamard), dataclasses.replace(weight, hadamard=0)
    return kernels.linear(input, weight, bias, activation_dtype)


_linear = register_linear(_serve, TRITON_DEVICE_TYPES, prepared=True)


@weight_kernel
def _unpack(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float64 or not triton_serves(weight.packed.device):
        return reference.dequantize(weight, dtype)
    from .. import triton as kernels

    return kernels.dequantize(weight, dtype)


ternary_unpack.register_kernel(TRITON_DEVICE_TYPES)(_unpack)


@ternary_rotate.register_kernel(TRITON_DEVICE_TYPES)
@returns_no_view
def _rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    from .. import triton as kernels

    if x.dtype == torch.float64 or block > kernels.MAX_HADAMARD or not triton_serves(x.device):
        rotated = rotate(x, block)
        return rotated.clone() if rotated is x else rotated.contiguous()
    return kernels.rotate(x, block)
