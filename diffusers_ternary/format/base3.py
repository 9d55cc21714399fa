# SPDX-License-Identifier: Apache-2.0
"""Base-3 packing, the layout in files: five trits a byte (3^5 = 243 <= 256), 1.6 bits per weight.

The codes of a matrix are one row-major stream. Byte i holds stream elements 5i .. 5i+4 as
`sum((code + 1) * 3**j for j in range(5))`, least significant trit first. The tail of the last byte is code 0.
"""

import functools

import torch


TRITS_PER_BYTE = 5
BYTE_VALUES = 3**TRITS_PER_BYTE
# Codes decoded at a time: bounds the temporary of `unpack_base3` to 16 MB whatever the size of the layer.
_CHUNK_BYTES = 1 << 20


def packed_base3_bytes(numel: int) -> int:
    """Number of bytes that hold `numel` codes."""
    return -(-numel // TRITS_PER_BYTE)


@functools.cache
def _decode_table() -> torch.Tensor:
    values = torch.arange(BYTE_VALUES)
    digits = [values // 3**j % 3 - 1 for j in range(TRITS_PER_BYTE)]
    return torch.stack(digits, dim=1).to(torch.int8)  # [243, 5]


def pack_base3(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes into base-3 bytes.

    Args:
        codes (`torch.Tensor`): int8 of any shape, values in {-1, 0, 1}; read in row-major order.

    Returns:
        `torch.Tensor`: uint8 of shape `[ceil(numel / 5)]`.

    Raises:
        ValueError: if a code is outside {-1, 0, 1}.
    """
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) > 1):
        raise ValueError(f"Ternary codes must be -1, 0 or 1, got {int(flat.min())}..{int(flat.max())}.")
    size = packed_base3_bytes(flat.numel())
    packed = torch.empty(size, dtype=torch.uint8, device=codes.device)
    for start in range(0, size, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, size)
        part = flat[start * TRITS_PER_BYTE : stop * TRITS_PER_BYTE]
        missing = (stop - start) * TRITS_PER_BYTE - part.numel()
        if missing:
            part = torch.cat([part, part.new_zeros(missing)])
        digits = (part.view(-1, TRITS_PER_BYTE) + 1).to(torch.uint8)
        byte = digits[:, 4]
        for j in (3, 2, 1, 0):  # Horner: the largest intermediate is 242, so uint8 never wraps
            byte = byte * 3 + digits[:, j]
        packed[start:stop] = byte
    return packed


def check_base3(packed: torch.Tensor) -> None:
    """Checks that every byte of `packed` (uint8) is one that five trits give.

    Raises:
        ValueError: names the first byte of 243 or more.
    """
    if packed.numel() and int(packed.max()) >= BYTE_VALUES:
        position = int((packed >= BYTE_VALUES).nonzero()[0])
        raise ValueError(
            f"Code byte {int(packed[position])} at offset {position}: base-3 bytes are below {BYTE_VALUES}. "
            "The data is corrupt; download or write it again."
        )


def unpack_base3(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of [`pack_base3`].

    Args:
        packed (`torch.Tensor`): uint8 of shape `[ceil(prod(shape) / 5)]`.
        shape (`tuple[int, ...]`): shape of the codes.

    Returns:
        `torch.Tensor`: int8 codes of `shape`.

    Raises:
        ValueError: if the size does not fit `shape`, or a byte is 243 or more (which no five trits give).
    """
    numel = 1
    for dim in shape:
        numel *= dim
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_base3_bytes(numel):
        raise ValueError(
            f"Packed codes of a {list(shape)} weight must be uint8 [{packed_base3_bytes(numel)}], "
            f"got {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}."
        )
    check_base3(packed)
    table = _decode_table().to(packed.device)
    codes = torch.empty(packed.numel() * TRITS_PER_BYTE, dtype=torch.int8, device=packed.device)
    rows = codes.view(-1, TRITS_PER_BYTE)
    for start in range(0, packed.numel(), _CHUNK_BYTES):
        part = packed[start : start + _CHUNK_BYTES]
        torch.index_select(table, 0, part.int(), out=rows[start : start + part.numel()])
    return codes[:numel].view(shape)
