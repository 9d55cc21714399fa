# SPDX-License-Identifier: Apache-2.0
"""The torch operators of this package."""

from . import mps, triton  # noqa: F401 (register the operators on GPUs)
from .checks import check_devices, check_float
from .int8 import int8_product
from .linear_map import ternary_linear, ternary_product
from .prepared import PreparedProducts, prepared_products
from .resident import ResidentWeight, resident_weight, unpacked_bytes
from .rotate import ternary_rotate
from .schema import ACTIVATION_DTYPES
from .serving import kernel_name
from .unpack import ternary_unpack, unpack_weight


__all__ = [
    "ACTIVATION_DTYPES",
    "PreparedProducts",
    "ResidentWeight",
    "check_devices",
    "check_float",
    "int8_product",
    "kernel_name",
    "prepared_products",
    "resident_weight",
    "ternary_linear",
    "ternary_product",
    "ternary_rotate",
    "ternary_unpack",
    "unpack_weight",
    "unpacked_bytes",
]
