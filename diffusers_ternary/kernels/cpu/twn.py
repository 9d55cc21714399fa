# SPDX-License-Identifier: Apache-2.0
"""Rounding by the rule of ternary weight networks in C: a weight is read once and leaves as planes and scales."""

import torch

from ...format import group_count, planes_width
from ...ternarize import register_fused_rounding
from .native import DTYPES, checked, open_library


VALUE_ERROR = -3  # DT_ERROR_VALUE of twn.c
THREAD_LEAST_WEIGHTS = 1 << 18


def twn_planes(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[`ternarize.rounding.twn`] of a whole weight.

    Args:
        weight (`torch.Tensor`): `[N, K]` on the CPU.
        group_size (`int`): columns per scale, at most K.

    Returns:
        int8 planes `[N, ceil(K / 4)]` and float32 scales `[N, G]`; `None` where plain torch must serve: without the
        compiled library, for other dtypes, and for weights with NaN or infinities, which it reports.
    """
    functions = open_library()
    if isinstance(functions, str) or weight.dtype not in DTYPES or weight.stride(1) != 1 or weight.numel() == 0:
        return None
    rows, columns = weight.shape
    planes = torch.empty(rows, planes_width(columns), dtype=torch.int8)
    scales = torch.empty(rows, group_count(columns, group_size))
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
    if result == VALUE_ERROR:
        return None
    checked(result)
    return planes, scales


register_fused_rounding("twn", "cpu", twn_planes)
