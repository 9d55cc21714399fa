# SPDX-License-Identifier: Apache-2.0
"""Between the layout of files (base-3 bytes) and that of memory (2-bit planes), without codes in between."""

import torch

from ...format import pack_base3, pack_planes, packed_base3_bytes, planes_width, unpack_base3, unpack_planes
from .native import checked, open_library


def base3_to_planes(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """What a file holds for a weight, as kernels take it.

    Args:
        packed (`torch.Tensor`): uint8 `[ceil(N * K / 5)]`, checked (see [`check_base3`]).
        out_features (`int`): N.
        in_features (`int`): K.

    Returns:
        `torch.Tensor`: int8 `[N, ceil(K / 4)]`.
    """
    functions = open_library()
    fits = packed.dtype == torch.uint8 and packed.numel() == packed_base3_bytes(out_features * in_features)
    if isinstance(functions, str) or not packed.is_cpu or not packed.is_contiguous() or not fits:
        return pack_planes(unpack_base3(packed, (out_features, in_features)))
    planes = torch.empty(out_features, planes_width(in_features), dtype=torch.int8)
    checked(functions.dt_base3_to_planes(packed.data_ptr(), 0, out_features, in_features, planes.data_ptr()))
    return planes


def planes_to_base3(planes: torch.Tensor, in_features: int) -> torch.Tensor:
    """Inverse of [`base3_to_planes`]: uint8 `[ceil(N * K / 5)]`."""
    functions = open_library()
    if isinstance(functions, str) or not planes.is_cpu or not planes.is_contiguous():
        return pack_base3(unpack_planes(planes, in_features))
    out_features = planes.shape[0]
    packed = torch.empty(packed_base3_bytes(out_features * in_features), dtype=torch.uint8)
    checked(functions.dt_planes_to_base3(planes.data_ptr(), 0, out_features, in_features, packed.data_ptr()))
    return packed
