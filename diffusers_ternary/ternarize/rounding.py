# SPDX-License-Identifier: Apache-2.0
"""Rounding rules: from the groups of a float weight to codes and scales, without data.

Every rule takes `[..., G, L]` groups (last groups padded with zeros) and the count of real columns per group, and is
vectorized over all leading dimensions. Padding never changes a result: codes of zeros are zero in every rule.
"""

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Ternarized:
    """Codes int8 `[N, G, L]` in {-1, 0, 1} and float32 scales `[N, G]` (not negative)."""

    codes: torch.Tensor
    scales: torch.Tensor


Rounding = Callable[[torch.Tensor, torch.Tensor], Ternarized]


def _threshold(groups: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (groups > delta).to(torch.int8) - (groups < -delta).to(torch.int8)


def _least_squares_scale(groups: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    # argmin_s ||w - s t||^2 = <w, t> / <t, t>; a group without nonzero codes has scale 0.
    support = codes.abs().sum(dim=-1, dtype=torch.float32)
    return (groups * codes).sum(dim=-1) / support.clamp_min(1)


def twn(groups: torch.Tensor, counts: torch.Tensor) -> Ternarized:
    """Ternary weight networks (Li et al., arXiv 1605.04711): threshold 0.75 E|w|, least-squares scale.

    Args:
        groups (`torch.Tensor`): float32 `[N, G, L]`, zero-padded.
        counts (`torch.Tensor`): float32 `[G]`, real columns per group.
    """
    delta = 0.75 * groups.abs().sum(dim=-1) / counts  # [N, G]
    codes = _threshold(groups, delta[..., None])
    return Ternarized(codes, _least_squares_scale(groups, codes))


def optimum(groups: torch.Tensor, counts: torch.Tensor) -> Ternarized:
    """The least-squares optimum over all codes and scales of a group.

    With |w| sorted in descending order and c_k the sum of the first k, the best code with k nonzeros keeps the k
    largest and its error is `||w||^2 - c_k^2 / k`; so k* = argmax c_k^2 / k and s = c_k* / k*.

    Args:
        groups (`torch.Tensor`): float32 `[N, G, L]`, zero-padded.
        counts (`torch.Tensor`): unused: padding zeros never win (they lower c_k^2 / k).
    """
    magnitudes, order = groups.abs().sort(dim=-1, descending=True)
    sums = magnitudes.cumsum(dim=-1)
    k = torch.arange(1, groups.shape[-1] + 1, device=groups.device, dtype=torch.float32)
    best = (sums * sums / k).argmax(dim=-1, keepdim=True)  # [N, G, 1]
    scales = (sums.gather(-1, best) / (best + 1)).squeeze(-1)
    kept = torch.arange(groups.shape[-1], device=groups.device) <= best  # by rank: equal magnitudes stay exact
    support = torch.empty_like(kept).scatter_(-1, order, kept)
    codes = (groups.sign() * support).to(torch.int8)
    return Ternarized(codes, scales)


def absmean(groups: torch.Tensor, counts: torch.Tensor) -> Ternarized:
    """BitNet b1.58 (Ma et al., arXiv 2402.17764): s = E|w|, t = clip(round(w / s), -1, 1). For comparison only.

    It is a convention for training from scratch; as post-training rounding it loses to both rules above.

    Args:
        groups (`torch.Tensor`): float32 `[N, G, L]`, zero-padded.
        counts (`torch.Tensor`): float32 `[G]`, real columns per group.
    """
    scales = groups.abs().sum(dim=-1) / counts
    codes = _threshold(groups, 0.5 * scales[..., None])
    return Ternarized(codes, scales)


ROUNDINGS: dict[str, Rounding] = {"twn": twn, "optimum": optimum, "absmean": absmean}

# From a weight `[N, K]` and a group size, fills planes int8 `[N, ceil(K / 4)]` with the codes of the rule and scales
# float32 `[N, G]`; false where the rule in torch must serve.
FusedRounding = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], bool]
# By rounding and type of the device; kernels enter themselves.
FUSED_ROUNDINGS: dict[tuple[str, str], FusedRounding] = {}
