# SPDX-License-Identifier: Apache-2.0
"""Prepared calls of the compiled library: all but the addresses is packed once."""

import math

import torch

from ..operands import Call, Layout, PackedWeight
from . import products
from .choice import choose
from .native import DTYPES, load


def prepare(layout: Layout, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call | None:
    """A call for inputs of one shape, or `None` where the operator's way is the only one.

    Args:
        layout ([`Layout`]): of the weight.
        shape, dtype (`torch.Size`, `torch.dtype`): of the input, `[..., K]`.
        device (`torch.device`): the CPU.
    """
    if dtype not in DTYPES or layout.scale_dtype not in DTYPES or layout.hadamard:
        return None
    if layout.activation_dtype not in ("auto", "int8") or (layout.bias_dtype or dtype) not in DTYPES:
        return None
    library = load()
    tokens, out_features, in_features = math.prod(shape[:-1]), layout.out_features, layout.in_features
    group_size = min(layout.group_size, in_features)
    if library is not None:
        dense = layout.activation_dtype == "auto"
        library = choose(library, tokens, group_size, in_features, layout.has_multiplier, dense)
    if library is None:
        return None
    threaded = tokens * out_features * in_features >= products.THREAD_LEAST_PRODUCTS
    product, pack = library.functions.dt_linear, library.pack
    variant, code, scale_code = library.variant_index, DTYPES[dtype], DTYPES[layout.scale_dtype]
    bias_code = 0 if layout.bias_dtype is None else DTYPES[layout.bias_dtype]
    out_shape = (*shape[:-1], out_features)

    def call(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        out = x.new_empty(out_shape)
        arguments = pack(
            variant,
            x.data_ptr(),
            in_features,
            code,
            weight.data_ptr(),
            scale.data_ptr(),
            scale_code,
            0 if multiplier is None else multiplier.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            bias_code,
            out.data_ptr(),
            out_features,
            tokens,
            out_features,
            in_features,
            group_size,
        )
        # 0 is by far the usual result: no token holds an infinity, and there was no error.
        if product(arguments, torch.get_num_threads() if threaded else 1) == 0:
            return out
        packed = PackedWeight(weight, scale.view(layout.scale_dtype), multiplier, in_features, group_size)
        return products.linear_int8(x, packed, bias, library=library)

    return call
