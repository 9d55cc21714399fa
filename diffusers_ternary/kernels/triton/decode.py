# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""From packed bytes to the operand of a dot product, in registers.

`(byte << 2j) & 0xC0` is the code of plane j in the two high bits. Read as int8 it is {0, 64, -64}; as float8_e4m3fn
{0, 2, -2}; as the high byte of a float16, bfloat16 or float32 {0, 2, -2}. The constant is undone in the epilogue.

`KIND` names the dot product: `"float"` (the activations as they are), `"int8"` or `"fp8"`.
`GROUPS` says how scales vary along K, and what they multiply: 0 = one per row (the output, in the epilogue), 1 = one
per row and block (the codes), 2 = one per element (the codes), 3 = one per row and block (the sum over the block).
"""

import triton
import triton.language as tl


@triton.jit
def plane_bits(packed, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """Moves the codes of one plane to the two high bits of each byte.

    Args:
        packed: int8 block of packed bytes.
        SHIFT: twice the index of the plane.
        ASM: four bytes per instruction through inline PTX; the plain twin serves other targets.
    """
    if ASM:
        # Bits that cross from the byte below stay under bit 6 and are masked away. A 32-bit argument takes one
        # register per element of the pack, hence four for the shift.
        bits = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $1, $2; and.b32 $0, $0, 0xC0C0C0C0; }",
            "=r,r,r,r,r,r",
            [packed, tl.full((), SHIFT, tl.int32)],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        bits = ((packed.to(tl.uint8, bitcast=True) << SHIFT) & 0xC0).to(tl.int8, bitcast=True)
    return bits


@triton.jit
def plane_halves(packed, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """The codes of one plane as the bits of 16-bit floats {0, 2, -2}, int16."""
    if ASM:
        bits = tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            shl.b32 t, $2, $3;
            and.b32 t, t, 0xC0C0C0C0;
            prmt.b32 $0, t, 0, 0x1404;
            prmt.b32 $1, t, 0, 0x3424; }""",
            "=r,=r,r,r,r,r,r",
            [packed, tl.full((), SHIFT, tl.int32)],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        )
    else:
        bits = plane_bits(packed, SHIFT, ASM).to(tl.int16) << 8
    return bits


@triton.jit
def four_bits(value):
    """Rounds a float32 to four significant bits, half to even, so that the cast to float8_e4m3fn is exact."""
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def times_integers(bits, multiplier, ASM: tl.constexpr):
    """Codes in the high bits, as `plane_bits` gives them, times integers of 0..63: int8 `code * multiplier`."""
    if ASM:
        # Four bytes at a time. Bit 6 spreads to a mask that keeps the multiplier; where the sign is set (and the
        # multiplier is not 0, or its negation would carry) the byte is negated by inverting it and adding 1.
        product = tl.inline_asm_elementwise(
            """{ .reg .b32 mask, ones, sign;
            shr.u32 mask, $1, 6;
            and.b32 mask, mask, 0x01010101;
            mul.lo.u32 mask, mask, 255;
            add.u32 sign, $2, 0x7F7F7F7F;
            lop3.b32 sign, sign, $1, 0x80808080, 0x80;
            shr.u32 ones, sign, 7;
            mul.lo.u32 sign, ones, 255;
            lop3.b32 $0, $2, mask, sign, 0x6A;
            add.u32 $0, $0, ones; }""",
            "=&r,r,r",
            [bits, multiplier],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        product = (bits >> 6) * multiplier
    return product


@triton.jit
def times_floats8(bits, magnitude, ASM: tl.constexpr):
    """The same for float8_e4m3fn magnitudes, as their bits: the code only zeroes or negates."""
    if ASM:
        product = tl.inline_asm_elementwise(
            """{ .reg .b32 mask, sign;
            shr.u32 mask, $1, 6;
            and.b32 mask, mask, 0x01010101;
            mul.lo.u32 mask, mask, 255;
            and.b32 sign, $1, 0x80808080;
            lop3.b32 $0, $2, mask, sign, 0xEA; }""",
            "=r,r,r",
            [bits, magnitude],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        # Bit 6 says "not zero": shifted to the sign and back it is a mask. Bit 7 is the sign.
        product = (magnitude & ((bits << 1) >> 7)) | (bits & -128)
    return product


@triton.jit
def times_floats(weight, scale, ASM: tl.constexpr):
    """Decoded codes times scales of the same float dtype."""
    if ASM and weight.dtype == tl.bfloat16:
        # sm_80 multiplies bfloat16 only in a fused multiply-add; adding -0 keeps the sign of zero.
        product = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [weight, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        product = weight * scale
    return product


@triton.jit
def decode(
    packed,
    group,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One plane of packed bytes as the operand of a dot product.

    Args:
        packed: int8 block of packed bytes.
        group: what `load_groups` returned, broadcastable to `packed`; used with `GROUPS` 1 and 2.
        DTYPE: dtype of the activations, with `KIND == "float"`.
    """
    if KIND == "int8":
        weight = plane_bits(packed, SHIFT, ASM)
        if GROUPS == 1 or GROUPS == 2:
            weight = times_integers(weight, group, ASM)
    elif KIND == "fp8":
        weight = plane_bits(packed, SHIFT, ASM)
        if GROUPS == 1 or GROUPS == 2:
            magnitude = four_bits(group.to(tl.float32)).to(tl.float8e4nv).to(tl.int8, bitcast=True)
            weight = times_floats8(weight, magnitude, ASM)
        weight = weight.to(tl.float8e4nv, bitcast=True)
    else:
        if DTYPE.primitive_bitwidth == 32:
            weight = (plane_bits(packed, SHIFT, ASM).to(tl.int32) << 24).to(DTYPE, bitcast=True)
        else:
            weight = plane_halves(packed, SHIFT, ASM).to(DTYPE, bitcast=True)
        if GROUPS == 1 or GROUPS == 2:
            weight = times_floats(weight, group.to(DTYPE), ASM)
    return weight


@triton.jit
def load_groups(scale_ptr, multiplier_ptr, rows, columns, N, K, G, GROUP_SIZE: tl.constexpr, KIND: tl.constexpr):
    """Scale (`"float"`, `"exact"`) or integer multiplier (`"int8"`, `"fp8"`) of each row and column.

    Args:
        scale_ptr: `[N, G]`, or `[N, 1]` with a multiplier.
        multiplier_ptr: int8 `[N, G]`, or None.
        rows, columns: indices that broadcast; `columns` is a scalar where a block lies in one group.
        GROUP_SIZE: columns per scale; compiled in, since a division by an unknown number takes twenty instructions.
    """
    # Rows and columns past the end meet codes or outputs that are masked: any valid scale will do.
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    groups = rows * G + tl.minimum(columns, K - 1) // GROUP_SIZE
    if KIND == "int8" or KIND == "fp8":
        group = tl.load(multiplier_ptr + groups)
    elif multiplier_ptr is None:
        group = tl.load(scale_ptr + groups).to(tl.float32)
    else:
        multiplier = tl.load(multiplier_ptr + groups).to(tl.float32)
        product = tl.load(scale_ptr + rows).to(tl.float32) * multiplier
        if KIND == "exact":
            group = tl.div_rn(product, 63.0)  # equal to the reference bit for bit, for ten instructions more
        else:
            group = product * (1.0 / 63.0)
    return group
