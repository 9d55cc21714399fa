# SPDX-License-Identifier: Apache-2.0
"""GGML itself, by its C functions: its reader of GGUF files and its dequantizers of all types.

The library is that of `libggml-python` (the extra `runtimes`), or the file that GGML_LIBRARY names: libggml-base of a
build of GGML, llama.cpp or stable-diffusion.cpp.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
from collections.abc import Iterator

import numpy as np


_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_GGUF = ctypes.c_void_p
_FLOATS = ctypes.POINTER(ctypes.c_float)


class _InitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOATS, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_SIGNATURES = {
    "gguf_init_from_file": ((ctypes.c_char_p, _InitParams), _GGUF),
    "gguf_free": ((_GGUF,), None),
    "gguf_get_n_tensors": ((_GGUF,), ctypes.c_int64),
    "gguf_get_data_offset": ((_GGUF,), ctypes.c_size_t),
    "gguf_get_tensor_name": ((_GGUF, ctypes.c_int64), ctypes.c_char_p),
    "gguf_get_tensor_type": ((_GGUF, ctypes.c_int64), ctypes.c_int),
    "gguf_get_tensor_size": ((_GGUF, ctypes.c_int64), ctypes.c_size_t),
    "gguf_get_tensor_offset": ((_GGUF, ctypes.c_int64), ctypes.c_size_t),
    "ggml_get_type_traits": ((ctypes.c_int,), ctypes.POINTER(_TypeTraits)),
}


def library_path() -> pathlib.Path | None:
    """Where GGML lies, if it does."""
    if "GGML_LIBRARY" in os.environ:
        return pathlib.Path(os.environ["GGML_LIBRARY"])
    package = importlib.util.find_spec("libggml")
    roots = package.submodule_search_locations if package is not None else None
    files = (file for root in roots or () for name in _NAMES for file in pathlib.Path(root).rglob(name))
    return next(files, None)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def read_with_ggml(file: pathlib.Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and float32 values of every tensor, in one dimension.

    Raises:
        ValueError: if GGML refuses the file, or its build does not know a type.
    """
    ggml, data = _library(), file.read_bytes()
    context = ggml.gguf_init_from_file(os.fsencode(file), _InitParams(True, None))
    if not context:
        raise ValueError(f"GGML does not read {file}.")
    try:
        for index in range(ggml.gguf_get_n_tensors(context)):
            name = ggml.gguf_get_tensor_name(context, index).decode()
            start = ggml.gguf_get_data_offset(context) + ggml.gguf_get_tensor_offset(context, index)
            stored = data[start : start + ggml.gguf_get_tensor_size(context, index)]
            traits = ggml.ggml_get_type_traits(ggml.gguf_get_tensor_type(context, index)).contents
            yield name, traits.type_name.decode(), _to_float(stored, traits)
    finally:
        ggml.gguf_free(context)


def _to_float(stored: bytes, traits: _TypeTraits) -> np.ndarray:
    values = np.empty(len(stored) // traits.type_size * traits.blck_size, dtype=np.float32)
    if traits.type_name == b"f32":
        return np.frombuffer(stored, dtype=np.float32)
    traits.to_float(stored, values.ctypes.data_as(_FLOATS), len(values))
    return values
