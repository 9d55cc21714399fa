# SPDX-License-Identifier: Apache-2.0
"""Bytes: how codes and scales are laid out in memory and in files. Knows bits, nothing of modules."""

from .base3 import check_base3, pack_base3, packed_base3_bytes, unpack_base3
from .dtypes import DTYPE_NAMES, DTYPES, dtype_name, stored_bytes
from .metadata import (
    FORMAT_VERSION,
    METADATA_KEY,
    REWRITE,
    WRITTEN_VERSION,
    FileLayout,
    TensorHeader,
    check_format_version,
    crc32,
)
from .planes import pack_planes, planes_width, unpack_planes
from .scales import (
    MULTIPLIER_MAX,
    double_quantize,
    expand_scales,
    group_count,
    group_scales,
    normalize_group_size,
    portable_scales,
    scale_layout,
    storage_dtype,
)
from .spec import (
    COLUMN_SCALE_DTYPE,
    FLOAT_NAMES,
    LOW_RANK_DTYPE,
    LOW_RANK_NAMES,
    Int8Spec,
    LayerSpec,
    TensorSpec,
    TernarySpec,
    layer_spec_from_json,
)


__all__ = [
    "COLUMN_SCALE_DTYPE",
    "DTYPES",
    "DTYPE_NAMES",
    "FLOAT_NAMES",
    "FORMAT_VERSION",
    "LOW_RANK_DTYPE",
    "LOW_RANK_NAMES",
    "METADATA_KEY",
    "MULTIPLIER_MAX",
    "REWRITE",
    "WRITTEN_VERSION",
    "FileLayout",
    "Int8Spec",
    "LayerSpec",
    "TensorHeader",
    "TensorSpec",
    "TernarySpec",
    "check_base3",
    "check_format_version",
    "crc32",
    "double_quantize",
    "dtype_name",
    "expand_scales",
    "group_count",
    "group_scales",
    "layer_spec_from_json",
    "normalize_group_size",
    "pack_base3",
    "pack_planes",
    "packed_base3_bytes",
    "planes_width",
    "portable_scales",
    "scale_layout",
    "storage_dtype",
    "stored_bytes",
    "unpack_base3",
    "unpack_planes",
]
