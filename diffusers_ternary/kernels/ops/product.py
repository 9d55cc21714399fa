# SPDX-License-Identifier: Apache-2.0
"""`diffusers_ternary::linear_inference`: the linear map without an autograd kernel, and which of the two serves.

An operator with a gradient formula passes through Python twice more for each call, which costs as much host time as
the products of a small model.
"""

import torch

from .. import blocked
from .mps import _linear as _linear_mps
from .serving import TRITON_DEVICE_TYPES
from .ternary_linear import _linear_cpu, check_arguments, ternary_linear
from .traced import traced_linear
from .triton import _linear as _linear_triton


_LIBRARY = torch.library.Library("diffusers_ternary", "FRAGMENT")
_LIBRARY.define(
    "linear_inference(Tensor input, Tensor weight, Tensor scale, Tensor? multiplier, Tensor? bias, SymInt in_features,"
    " SymInt group_size, str activation_dtype, SymInt hadamard=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_inference", _linear_cpu, "CPU")
_LIBRARY.impl("linear_inference", _linear_mps, "MPS")
for _device_type in TRITON_DEVICE_TYPES:
    _LIBRARY.impl("linear_inference", _linear_triton, _device_type.upper())


def _linear_blocked(
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
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    return blocked.linear(
        input,
        weight,
        scale,
        multiplier,
        bias,
        in_features=in_features,
        group_size=group_size,
        activation_dtype=activation_dtype,
        hadamard=hadamard,
    )


_LIBRARY.impl("linear_inference", _linear_blocked, "CompositeExplicitAutograd")


@torch.library.register_fake("diffusers_ternary::linear_inference", lib=_LIBRARY)
def _(
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
    check_arguments(input, (weight, scale, multiplier, bias), in_features, activation_dtype)
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def ternary_product(
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
    """[`ternary_linear`], by the operator without a gradient formula where a compiled graph needs none."""
    arguments = (input, weight, scale, multiplier, bias, in_features, group_size, activation_dtype, hadamard)
    if torch.compiler.is_compiling() and not _is_exporting() and not _needs_gradient(input, bias):
        y = traced_linear(*arguments)
        return torch.ops.diffusers_ternary.linear_inference(*arguments) if y is None else y
    return ternary_linear(*arguments)


def _needs_gradient(input: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))


def _is_exporting() -> bool:
    """An exported program may be trained later."""
    return torch.compiler.is_exporting()
