# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map on the CPU: int8 activations (W1.58A8), or exact float32."""

import torch

from .. import reference
from ..operands import PackedWeight
from . import fallback
from .choice import choose
from .native import DTYPES, NativeLibrary, load


# Below this many products a second thread costs more than it saves (handing over takes about 30 us).
THREAD_LEAST_PRODUCTS = 1 << 22
# Float32 elements of the weight that the exact path decodes at a time: 4 MiB, a second-level cache.
EXACT_BLOCK_ELEMENTS = 1 << 20
# Elements of x that the exact path converts to float32 at a time.
EXACT_TOKEN_ELEMENTS = 1 << 22


def kernel_name() -> str:
    """Which kernel serves `activation_dtype="int8"`: a native variant, `"torch-onednn"` or `"torch-blocked"`."""
    library = load()
    if library is not None:
        return library.variant
    return "torch-onednn" if fallback.onednn_is_exact() else "torch-blocked"


def linear_int8(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    library: NativeLibrary | None = None,
    dense: bool = False,
) -> torch.Tensor:
    """`x @ W.T + bias` with each token of x rounded to int8 (scale max|token| / 127, half to even).

    Args:
        x (`torch.Tensor`): `[..., K]` float, rotated as the weight asks for. A token with NaN gives NaN; a token with
            an infinity is multiplied exactly, as `F.linear` would.
        weight ([`PackedWeight`]): W.
        bias (`torch.Tensor`, *optional*): `[N]`.
        library (`NativeLibrary`, *optional*): the kernel to use; defaults to what [`choose`] finds.
        dense (`bool`): whether a bfloat16 product with the dense weight may serve where it is faster.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`.

    Raises:
        ValueError: if a tensor does not fit `in_features` and `group_size`.
    """
    weight.check(bias)
    tokens = x.reshape(-1, weight.in_features)  # [M, K]
    if library is None and (library := load()) is not None:
        library = choose(
            library, tokens.shape[0], weight.group_size, weight.in_features, weight.multiplier is not None, dense
        )
        if library is None:
            # In bfloat16, for CPUs with tiles for it: closer than int8 activations.
            return _by_blocks(tokens.bfloat16(), weight, bias, x)
    if tokens.dtype not in DTYPES:
        tokens = tokens.float()
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    infinite: int | bool
    if library is None:
        out, infinite = fallback.linear_int8(tokens, weight, bias)
    else:
        out, infinite = _native(library, tokens, weight, bias)
    if infinite:
        bad = tokens.isinf().any(1).nonzero()[:, 0]
        out[bad] = linear_exact(tokens[bad], weight, bias)
    return out.view(*x.shape[:-1], weight.out_features).to(x.dtype)


def _native(
    library: NativeLibrary, tokens: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    # Kept in locals until the call returns: the arguments hold addresses only.
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(tokens.shape[0], weight.out_features, dtype=tokens.dtype)
    if out.numel() == 0:
        return out, 0
    arguments = library.arguments(tokens, weight, bias, out)
    workers = torch.get_num_threads() if out.numel() * weight.in_features >= THREAD_LEAST_PRODUCTS else 1
    return out, library.linear(arguments, workers)


def linear_exact(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ W.T + bias` in float32 whatever the dtype of x; W is decoded block by block, never as a whole.

    Args and returns as [`linear_int8`].
    """
    weight.check(bias)
    tokens = x.reshape(-1, weight.in_features)
    at_a_time = None if x.dtype == torch.float32 else max(64, EXACT_TOKEN_ELEMENTS // weight.in_features)
    # float32: a bfloat16 sum over K = 15360 loses small terms
    return _by_blocks(tokens, weight, bias, x, torch.float32, at_a_time)


def _by_blocks(
    tokens: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    like: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    at_a_time: int | None = None,
) -> torch.Tensor:
    """The product in `dtype` with some output features of the dense weight, and `at_a_time` tokens, at a time.

    Args:
        tokens (`torch.Tensor`): `[M, K]`.
        like (`torch.Tensor`): the layer's input, for the shape and dtype of the result.
    """
    out = torch.empty(tokens.shape[0], weight.out_features, dtype=like.dtype)
    token_step = at_a_time or max(1, tokens.shape[0])
    step = max(16, EXACT_BLOCK_ELEMENTS // weight.in_features)
    for first in range(0, weight.out_features, step):
        last = min(first + step, weight.out_features)
        dense = dequantize(weight.part(first, last)).to(dtype)  # [n, K]
        offset = None if bias is None else bias[first:last].to(dtype)
        for token in range(0, tokens.shape[0], token_step):
            some = tokens[token : token + token_step].to(dtype)  # [m, K]
            out[token : token + token_step, first:last] = torch.nn.functional.linear(some, dense, offset)
    return out.view(*like.shape[:-1], weight.out_features)


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """Codes times scales, float32 `[N, K]`."""
    library = load()
    if library is None:
        return reference.dequantize(weight, torch.float32)
    weight = weight.contiguous()
    dense = torch.empty(weight.out_features, weight.in_features)
    workers = torch.get_num_threads() if dense.numel() >= THREAD_LEAST_PRODUCTS // 16 else 1
    library.dequantize(weight, dense, workers)
    return dense
