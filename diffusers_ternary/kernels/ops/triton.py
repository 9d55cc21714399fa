# SPDX-License-Identifier: Apache-2.0
"""The operators on GPUs: Triton's kernels, registered for CUDA, ROCm (`"cuda"` to torch as well) and XPU.

Where they cannot run the reference serves, and one line of the log says why. Triton is imported at the first call.
"""

import torch

from ...ternarize import rotate
from .. import blocked, reference
from ..compat import returns_no_view
from .checks import check_devices
from .prepared import quick_linear
from .rotate import ternary_rotate
from .serving import TRITON_DEVICE_TYPES, triton_serves
from .ternary_linear import check_arguments, ternary_linear
from .unpack import ternary_dequantize


@ternary_linear.register_kernel(TRITON_DEVICE_TYPES)
@returns_no_view
def _linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    activation_dtype: str,
    hadamard: int = 0,
) -> torch.Tensor:
    quick = quick_linear(input, weight, scale, multiplier, bias, in_features, group_size, activation_dtype, hadamard)
    if quick is not None:
        return quick
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    packed = (weight, scale, multiplier, bias)
    # Whoever asks for float64 wants exact numbers (gradient checks), not speed.
    if input.dtype == torch.float64 or not triton_serves(input.device):
        return blocked.linear(
            input,
            *packed,
            in_features=in_features,
            group_size=group_size,
            activation_dtype=activation_dtype,
            hadamard=hadamard,
        )
    from .. import triton as kernels

    if hadamard > kernels.MAX_HADAMARD:
        input, hadamard = rotate(input, hadamard), 0
    return kernels.linear(
        input,
        *packed,
        in_features=in_features,
        group_size=group_size,
        activation_dtype=activation_dtype,
        hadamard=hadamard,
    )


@ternary_dequantize.register_kernel(TRITON_DEVICE_TYPES)
def _dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_devices(weight.device, "the weight", scale=scale, multiplier=multiplier)
    if dtype == torch.float64 or not triton_serves(weight.device):
        return reference.dequantize(
            weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype
        )
    from .. import triton as kernels

    return kernels.dequantize(weight, scale, multiplier, in_features=in_features, group_size=group_size, dtype=dtype)


@ternary_rotate.register_kernel(TRITON_DEVICE_TYPES)
@returns_no_view
def _rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    from .. import triton as kernels

    if x.dtype == torch.float64 or block > kernels.MAX_HADAMARD or not triton_serves(x.device):
        rotated = rotate(x, block)
        return rotated.clone() if rotated is x else rotated.contiguous()
    return kernels.rotate(x, block)
