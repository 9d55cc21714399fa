# SPDX-License-Identifier: Apache-2.0
"""Checks the header of a GGUF file against the file's size before the `gguf` package reads it.

That package believes every count: a file of 49 bytes that speaks of an array of 2^62 entries keeps it busy, and its
memory growing, for good.
"""

import os
import pathlib
import struct
from typing import BinaryIO


_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Bytes of the other types: (u)int8, (u)int16, (u)int32, float32, bool, (u)int64, float64.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The least that an entry takes: a key of no letters, its type and a byte; a tensor without name and dimensions.
_FIELD_BYTES, _TENSOR_BYTES = 13, 24
_MAX_DEPTH = 3
_MAX_DIMENSIONS = 8
# Of one file, read one by one in Python. Vocabularies have some 900,000 entries, denoisers none.
_MAX_ENTRIES = 4_000_000
_MAX_FIELDS = 100_000
# GGML's smallest types have 1.56 bits a weight.
_WEIGHTS_PER_BYTE = 8


def check_header(path: pathlib.Path) -> None:
    """Walks through the header without keeping anything.

    Raises:
        ValueError: if a count or length cannot be true for a file of this size, or no known file has so many.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        _Header(file, os.fstat(file.fileno()).st_size).check()


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.order = "<"
        self.entries = 0

    def check(self) -> None:
        if self.file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # written on a big-endian machine
            self.order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        self._count(tensors + fields, 1, "tensors and fields", _MAX_FIELDS)
        self._count(fields, _FIELD_BYTES, "fields", _MAX_FIELDS)
        for _ in range(fields):
            self._string()
            self._value(self._number("I"), _MAX_DEPTH)
        self._count(tensors, _TENSOR_BYTES, "tensors", _MAX_FIELDS)
        for _ in range(tensors):
            self._tensor()

    def _left(self) -> int:
        return self.size - self.file.tell()

    def _number(self, code: str) -> int:
        data = self.file.read(struct.calcsize(code))
        if len(data) < struct.calcsize(code):
            raise ValueError("its header is cut off")
        return int(struct.unpack(f"{self.order}{code}", data)[0])

    def _skip(self, count: int, what: str) -> None:
        if count > self._left():
            raise ValueError(f"{what} of {count} bytes, where {self._left()} are left in the file")
        self.file.seek(count, os.SEEK_CUR)

    def _count(self, count: int, least: int, what: str, most: int) -> None:
        if count * least > self._left():
            raise ValueError(f"{count} {what}, where {self._left()} bytes are left in the file")
        if count > most:
            raise ValueError(f"{count} {what}; at most {most} are read")

    def _string(self) -> None:
        self._skip(self._number("Q"), "a string")

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array(depth)
        elif kind in _SIZES:
            self._skip(_SIZES[kind], "a number")
        else:
            raise ValueError(f"a field of the type {kind}, which is unknown")

    def _array(self, depth: int) -> None:
        if depth == 0:
            raise ValueError(f"arrays nested deeper than {_MAX_DEPTH}")
        kind, count = self._number("I"), self._number("Q")
        self._count(count, _SIZES.get(kind, 8), "entries of an array", _MAX_ENTRIES)
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise ValueError(f"arrays of more than {_MAX_ENTRIES} entries")
        if kind in _SIZES:
            self._skip(count * _SIZES[kind], "an array")
            return
        for _ in range(count):
            self._value(kind, depth - 1)

    def _tensor(self) -> None:
        self._string()
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        weights = 1
        for _ in range(dimensions):
            weights *= self._number("Q")
        if weights > self.size * _WEIGHTS_PER_BYTE:
            raise ValueError(f"a tensor of {weights} values, in a file of {self.size} bytes")
        self._skip(4 + 8, "a type and an offset")
