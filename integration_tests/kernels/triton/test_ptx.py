# SPDX-License-Identifier: Apache-2.0
"""The inlined PTX of the decoder, executed by a small emulator over every code, multiplier and neighbor.

The interpreter runs the plain twins only, and no GPU is needed to know what these instructions do.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

from diffusers_ternary.kernels import triton as kernels


SOURCE = ast.parse((Path(kernels.__file__).parent / "decode.py").read_text())
CODES = {0: 0b00, 1: 0b01, -1: 0b11}
WORD = 0xFFFFFFFF


def assembly(function: str) -> str:
    """The text of the inlined PTX of a function of `decode`."""
    definition = next(node for node in SOURCE.body if getattr(node, "name", "") == function)
    calls = [node for node in ast.walk(definition) if isinstance(node, ast.Call)]
    call = next(node for node in calls if getattr(node.func, "attr", "") == "inline_asm_elementwise")
    text = call.args[0]
    assert isinstance(text, ast.Constant)
    return str(text.value)


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Each bit of the result is the bit of `table` that the bits of a, b and c number (a the highest)."""
    result = 0
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result & WORD


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes picked from those of a (0..3) and b (4..7)."""
    pool = [(a >> 8 * i) & 0xFF for i in range(4)] + [(b >> 8 * i) & 0xFF for i in range(4)]
    return sum(pool[(selector >> 4 * i) & 7] << 8 * i for i in range(4))


OPERATIONS = {
    "shl.b32": lambda a, b: (a << b) & WORD,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: (a + b) & WORD,
    "mul.lo.u32": lambda a, b: (a * b) & WORD,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Runs straight-line PTX on 32-bit registers, named as in the text."""
    for statement in text.strip(" {}\n").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if not words[0] or words[0] == ".reg":
            continue
        name, target, *operands = words
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = OPERATIONS[name](*values)
    return registers


def bytes_of(word: int) -> list[int]:
    return [(word >> 8 * i) & 0xFF for i in range(4)]


def word_of(values: list[int]) -> int:
    return sum((value & 0xFF) << 8 * i for i, value in enumerate(values))


def signed(byte: int) -> int:
    return byte - 256 if byte & 0x80 else byte


# Every packed byte, beside neighbors whose bits could cross over.
PACKED = [
    [sum(CODES[code] << 6 - 2 * j for j, code in enumerate(codes)), 0xFF, 0x00, 0x55]
    for codes in itertools.product(CODES, repeat=4)
]


@pytest.mark.parametrize("plane", range(4))
def test_plane_bits(plane):
    text = assembly("plane_bits")
    for values in PACKED:
        out = bytes_of(execute(text, {"$1": word_of(values), "$2": 2 * plane})["$0"])
        assert out == [(value << 2 * plane) & 0xC0 for value in values]


@pytest.mark.parametrize("plane", range(4))
def test_plane_halves(plane):
    text = assembly("plane_halves")
    for values in PACKED:
        out = execute(text, {"$2": word_of(values), "$3": 2 * plane})
        halves = [out["$0"] & 0xFFFF, out["$0"] >> 16, out["$1"] & 0xFFFF, out["$1"] >> 16]
        assert halves == [((value << 2 * plane) & 0xC0) << 8 for value in values]
    # As bfloat16 and float16 these are 0, 2 and -2.
    for code, bits in CODES.items():
        pattern = torch.tensor([bits << 14], dtype=torch.int32).to(torch.int16)
        assert float(pattern.view(torch.bfloat16)) == float(pattern.view(torch.float16)) == 2 * code


def test_times_integers():
    text = assembly("times_integers")
    for code, multiplier, neighbor in itertools.product(CODES, range(64), CODES):
        codes = [neighbor, code, -code, neighbor]
        multipliers = [63, multiplier, 63 - multiplier, 0]
        bits = word_of([CODES[c] << 6 for c in codes])
        out = bytes_of(execute(text, {"$1": bits, "$2": word_of(multipliers)})["$0"])
        assert [signed(byte) for byte in out] == [c * m for c, m in zip(codes, multipliers, strict=True)]


def test_times_floats8():
    text = assembly("times_floats8")
    magnitudes = torch.arange(64.0).to(torch.float8_e4m3fn)
    for code, index in itertools.product(CODES, range(64)):
        codes = [code, -code, 0, code]
        bytes_in = [int(magnitudes.view(torch.uint8)[i]) for i in (index, 63 - index, 63, 0)]
        bits = word_of([CODES[c] << 6 for c in codes])
        out = bytes_of(execute(text, {"$1": bits, "$2": word_of(bytes_in)})["$0"])
        values = torch.tensor(out, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        expected = torch.tensor(bytes_in, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * torch.tensor(codes)
        assert torch.equal(values, expected)
