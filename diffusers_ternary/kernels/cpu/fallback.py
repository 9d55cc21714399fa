# SPDX-License-Identifier: Apache-2.0
"""The torch-only path: oneDNN's int8 product where it is exact, else float32 products of decoded blocks."""

import functools
import logging

import torch

from .. import reference
from ..operands import PackedWeight


logger = logging.getLogger(__name__)

BLOCK_ELEMENTS = 1 << 20  # weight elements decoded at a time
ONEDNN_LEAST_TOKENS = 32  # prepacking the weight costs more than it saves below


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds tokens to int8 as the native kernels do.

    Args:
        x (`torch.Tensor`): `[M, K]` float.

    Returns:
        int8 `[M, K]`, float32 scales `[M, 1]` (NaN for a row with NaN or an infinity), and the largest magnitudes.
    """
    largest = x.abs().amax(1, keepdim=True).float() if x.shape[1] else x.new_zeros(x.shape[0], 1)
    # 2^100 lifts rows near the subnormals, whose 127 / largest would overflow.
    lift = torch.where(largest < 2.0**-95, 2.0**100, 1.0)
    lifted = largest * lift
    finite = torch.isfinite(largest)
    inverse = torch.where(finite & (lifted > 0), torch.full_like(lifted, 127.0) / lifted, 0.0)
    q = torch.where(finite, (x.float() * lift).mul_(inverse), 0.0).round_()
    scale = torch.where(finite, lifted / 127.0 / lift, torch.nan)
    return q.to(torch.int8), scale, largest


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 product gives the exact integers here for weights up to 63 (it saturates on some CPUs)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (40, 520), generator=generator).mul_(254).sub_(127).to(torch.int8)
    weight = torch.randint(0, 2, (24, 520), generator=generator).mul_(126).sub_(63).to(torch.int8)
    x[0], weight[0] = 127, 63
    try:
        exact = torch.equal(_onednn(x, weight, torch.ones(24)), (x.long() @ weight.long().T).float())
    except (RuntimeError, AttributeError) as error:
        logger.info("oneDNN's int8 product is not available: %s", error)
        return False
    if not exact:
        logger.info("oneDNN's int8 product is inexact on this CPU and is not used.")
    return exact


def _onednn(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 `[M, N]` of int8 `[M, K]` times int8 `[N, K]`, scaled per column."""
    packed = torch.ops.onednn.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def linear_int8(tokens: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """The int8 linear map in torch.

    Args:
        tokens (`torch.Tensor`): `[M, K]` float; the others as in `products.linear_int8`.

    Returns:
        `[M, N]` in the dtype of `tokens`, and whether some tokens hold an infinity (they are NaN here).
    """
    out = torch.empty(tokens.shape[0], weight.out_features, dtype=tokens.dtype)
    if out.numel() == 0:
        return out, False
    q, token_scale, largest = quantize_tokens(tokens)
    per_row = weight.scale.shape[1] == 1  # one scale per row, or multipliers that fold into integers
    use_onednn = per_row and tokens.shape[0] >= ONEDNN_LEAST_TOKENS and onednn_is_exact()
    factors = None if use_onednn else q.float()
    step = max(16, BLOCK_ELEMENTS // weight.in_features)
    for first in range(0, weight.out_features, step):
        last = min(first + step, weight.out_features)
        part = weight.part(first, last)
        if factors is None:
            block = _onednn(q, *reference.integer_weight(part))
        else:
            block = factors @ reference.dequantize(part, torch.float32).T
        block.mul_(token_scale)
        if bias is not None:
            block.add_(bias[first:last])
        out[:, first:last] = block
    return out, bool(torch.isinf(largest).any())
