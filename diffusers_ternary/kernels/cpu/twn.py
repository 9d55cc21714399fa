# SPDX-License-Identifier: Apache-2.0
"""Rounding by the rule of ternary weight networks in C: a weight is read once and leaves as planes and scales."""

import torch

from ...ternarize import FUSED_ROUNDINGS
from .native import DTYPES, checked, open_library


VALUE_ERROR = -3  # DT_ERROR_VALUE of twn.c
THREAD_LEAST_WEIGHTS = 1 << 18


def twn_planes(weight: torch.Tensor, group_size: int, planes: torch.Tensor, scales: torch.Tensor) -> bool:
    """[`ternarize.rounding.twn`] of a whole weight.

    Args:
        weight (`torch.Tensor`): `[N, K]` on the CPU.
        group_size (`int`): columns per scale, at most K.
        planes (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, contiguous; filled.
        scales (`torch.Tensor`): float32 `[N, G]`, contiguous; filled.

    Returns:
        `bool`: false where plain torch must serve: without the compiled library, for other dtypes, and for weights
        with NaN or infinities, which it reports.
    """
    functions = open_library()
    if isinstance(functions, str) or weight.dtype not in DTYPES or weight.stride(1) != 1 or weight.numel() == 0:
        return False
    rows, columns = weight.shape
    workers = torch.get_num_threads() if weight.numel() >= THREAD_LEAST_WEIGHTS else 1
    result = functions.dt_twn(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        weight.stride(0),
        rows,
        columns,
        group_size,
        planes.data_ptr(),
        scales.data_ptr(),
        workers,
    )
    return result != VALUE_ERROR and checked(result) == 0


FUSED_ROUNDINGS["twn", "cpu"] = twn_planes
