# SPDX-License-Identifier: Apache-2.0
"""Scale layouts: one 16-bit scale per group, or a 6-bit multiplier per group times one 16-bit scale per row."""

import torch


# An int8 dot product needs `code * multiplier` in int8, and the CPU's int8 paths are exact only up to 64.
MULTIPLIER_MAX = 63
_LARGEST_PORTABLE = 65280.0  # the largest bfloat16 that is a float16


def normalize_group_size(group_size: int | None, in_features: int) -> int:
    """Group size for a row of `in_features` columns: `None` and anything larger mean one group per row.

    Raises:
        ValueError: if it is not positive.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size} is not a positive integer; None means one scale per row.")
    return in_features if group_size is None else min(group_size, in_features)


def group_count(in_features: int, group_size: int) -> int:
    """Groups per row; the last one may be shorter."""
    return -(-in_features // group_size)


def scale_layout(requested: str, in_features: int, group_size: int) -> str:
    """Resolves `"auto"`: the layout that stores fewer bits per row; `"group"` on a tie.

    6-bit multipliers add at most 0.8 % of the row's largest scale to a group's scale. Measured, that is an error of
    -36 to -48 dB of the ternary weight at group size 128, where ternary rounding itself leaves -4 to -9 dB: it costs
    less than 0.005 dB of the weight's SNR (`integration_tests/benchmarks/results/scales.csv`), and saves 0.06 bits
    per weight. With fewer than three groups a row, plain 16-bit scales are the smaller ones.
    """
    if requested != "auto":
        return requested
    groups = group_count(in_features, group_size)
    return "double" if 8 * groups + 16 < 16 * groups else "group"


def group_scales(scale: torch.Tensor, multiplier: torch.Tensor | None) -> torch.Tensor:
    """Effective float32 scale of every group.

    Args:
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; any float dtype.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`, values 0..63.

    Returns:
        `torch.Tensor`: float32 `[N, G]`; `scale * multiplier / 63` with a multiplier, else `scale`.
    """
    if multiplier is None:
        return scale.float()
    return scale.float() * multiplier.float() / MULTIPLIER_MAX


def expand_scales(scales: torch.Tensor, group_size: int, in_features: int) -> torch.Tensor:
    """Repeats group scales `[N, G]` over their columns to `[N, K]`."""
    if scales.shape[1] == 1:
        return scales.expand(-1, in_features)
    return scales.repeat_interleave(group_size, dim=1)[:, :in_features]


def storage_dtype(scales: torch.Tensor) -> torch.dtype:
    """16-bit dtype that stores `scales` best: float16 (11 bits), or bfloat16 where float16 would lose its range."""
    nonzero = scales[scales > 0]
    limits = torch.finfo(torch.float16)
    if nonzero.numel() and (float(nonzero.min()) < limits.smallest_normal or float(nonzero.max()) > limits.max):
        return torch.bfloat16
    return torch.float16


def portable_scales(scales: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 scales that float16 holds as well: 8 significant bits, within the range of float16.

    GGUF files have float16 scales, and mflux computes in bfloat16: neither has to round these. From 6e-5 on they are
    at most 0.4 % off; what is smaller becomes a multiple of 6e-8.
    """
    return scales.to(torch.bfloat16).clamp(max=_LARGEST_PORTABLE).half().to(torch.bfloat16)


def double_quantize(scales: torch.Tensor, *, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits group scales into a row scale and 6-bit multipliers.

    Args:
        scales (`torch.Tensor`): float32 `[N, G]`, not negative.
        dtype (`torch.dtype`, *optional*): of the row scale; default: what stores it best (see [`storage_dtype`]).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scale 16-bit `[N, 1]` (the largest of the row) and multiplier uint8
        `[N, G]`, the nearest of 1..63; 0 only where the group scale is 0. The absolute error is at most
        `scale / 126` (`scale / 63` for groups below `scale / 126`, which would otherwise vanish) plus the rounding
        of the 16-bit row scale.
    """
    largest = scales.amax(dim=1, keepdim=True)
    row = largest.to(storage_dtype(largest) if dtype is None else dtype)
    safe = row.float().clamp_min(torch.finfo(torch.float32).tiny)
    multiplier = (scales / safe * MULTIPLIER_MAX).round().clamp(1, MULTIPLIER_MAX)
    multiplier = torch.where(scales > 0, multiplier, torch.zeros_like(multiplier))
    return row, multiplier.to(torch.uint8)
