# SPDX-License-Identifier: Apache-2.0
"""Names of dtypes in safetensors files."""

import math

import torch


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The name of a tensor's dtype.

    Raises:
        ValueError: if safetensors files cannot hold it; names the tensor (`name`).
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} is {tensor.dtype}, which safetensors files cannot hold. Convert it to float first.")
    return DTYPE_NAMES[tensor.dtype]


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file."""
    # What is not known here (other 8-bit floats, say) is one byte wide today.
    return math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
