# SPDX-License-Identifier: Apache-2.0
"""The 2-bit types of GGUF that the `gguf` package does not know yet, for its writer and its reader.

Everything here leans on what that package does not document; a canary test says when it knows the types itself.
"""

import enum
from typing import Any

from ..extras import import_extra


class TwoBitType(enum.IntEnum):
    """GGML types of 2 bits and less that came after the newest `gguf` release: their ids in files."""

    Q2_0 = 42
    PQ2_0 = 142
    PTQ1_0 = 143


# (weights in a block, its bytes). Some published files use id 42 for blocks of 128; their size tells.
BLOCKS = {TwoBitType.Q2_0: (64, 18), TwoBitType.PQ2_0: (128, 34), TwoBitType.PTQ1_0: (128, 28)}
_WIDE_Q2_0 = (128, 34)


def writable_type(name: str) -> Any:
    """The value of `raw_dtype` by which the package's writer stores a type, e.g. `"Q2_0"`."""
    gguf = import_extra("gguf", "Writing GGUF files")
    if name not in TwoBitType.__members__:
        return gguf.GGMLQuantizationType[name]
    # The writer looks the size of a block up by the number of its type.
    gguf.constants.GGML_QUANT_SIZES.setdefault(TwoBitType[name], BLOCKS[TwoBitType[name]])
    return TwoBitType[name]


def open_reader(path: Any) -> Any:
    """The package's reader, which knows the types of [`TwoBitType`] as well.

    A tensor of such a type has `tensor_type` of [`TwoBitType`] and `data` uint8 `[rows, bytes]`; Q2_0 in blocks of 128
    is given out as PQ2_0, which is the same.
    """
    gguf = import_extra("gguf", "Reading GGUF files")

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            own = {int(kind) for kind in TwoBitType}
            super()._build_tensors(start_offs, [field for field in fields if int(field.parts[4][0]) not in own])
            offsets = sorted(int(field.parts[5][0]) for field in fields)
            ends = dict(zip(offsets, [*offsets[1:], len(self.data) - start_offs], strict=True))
            for field in fields:
                if int(field.parts[4][0]) in own:
                    offset = int(field.parts[5][0])
                    self.tensors.append(self._two_bit(field, start_offs + offset, ends[offset] - offset))

        def _two_bit(self, field: Any, start: int, room: int) -> Any:
            _, name, _, shape, kind, _ = field.parts
            kind, weights = TwoBitType(int(kind[0])), int(shape.prod())
            block, size = BLOCKS[kind]
            if kind is TwoBitType.Q2_0 and weights // block * size > room:
                kind, (block, size) = TwoBitType.PQ2_0, _WIDE_Q2_0
            if int(shape[0]) % block:
                raise ValueError(f"{bytes(name).decode()}: rows of {shape[0]} weights are not blocks of {block}")
            data = self._get(start, gguf.gguf_reader.np.uint8, weights // block * size)
            rows = weights // int(shape[0])
            return gguf.gguf_reader.ReaderTensor(
                name=bytes(name).decode(),
                tensor_type=kind,
                shape=shape,
                n_elements=weights,
                n_bytes=data.nbytes,
                data_offset=start,
                data=data.reshape(rows, -1),
                field=field,
            )

    return Reader(path)
