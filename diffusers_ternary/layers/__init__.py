# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` and `nn.Conv2d` subclasses that hold packed weights."""

from .base import LayerRecord, QuantizedLayer, read_records
from .concatenate import concatenate_rows
from .conv import QuantizedConv2d
from .int8 import Int8Conv2d, Int8Layer, Int8Linear
from .linear import QuantizedLinear
from .resident import keep_unpacked
from .shapes import FLOAT_TYPES, FloatLayer, input_rows, matrix_shape, output_rows, reason_not_to_pack
from .ternary import TernaryConv2d, TernaryLayer, TernaryLinear


__all__ = [
    "FLOAT_TYPES",
    "FloatLayer",
    "Int8Conv2d",
    "Int8Layer",
    "Int8Linear",
    "LayerRecord",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "TernaryConv2d",
    "TernaryLayer",
    "TernaryLinear",
    "concatenate_rows",
    "input_rows",
    "keep_unpacked",
    "matrix_shape",
    "output_rows",
    "read_records",
    "reason_not_to_pack",
]
