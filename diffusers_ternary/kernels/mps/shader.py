# SPDX-License-Identifier: Apache-2.0
"""The Metal kernel that unpacks ternary weights, its body in what C and the Metal language have in common."""

import torch


# One packed byte: four elements of a row, one of each plane. Tests compile this as C. OUT, SCALE and DOUBLE are
# defined before it; so are `device`, `constant` and `kernel` for C.
BODY = """
static inline void unpack_byte(
    device OUT* out, device const signed char* weight, device const SCALE* scale,
    device const unsigned char* multiplier, int columns, int width, int group_size, int groups, int row, int byte)
{
    int packed = weight[row * (long)width + byte];
    for (int plane = 0; plane < 4; ++plane) {
        int column = plane * width + byte;
        if (column >= columns) break;
        /* The code in the two high bits of a byte, two's complement: 0, 1 or 3 for 0, 1 and -1. */
        int bits = ((packed << (2 * plane)) >> 6) & 3;
        float code = bits == 3 ? -1.0f : (float)bits;
        int group = column / group_size;
        float value = (float)scale[row * (long)(DOUBLE ? 1 : groups) + (DOUBLE ? 0 : group)];
        if (DOUBLE) value = value * (float)multiplier[row * (long)groups + group] / 63.0f;
        out[row * (long)columns + column] = (OUT)(code * value);
    }
}
"""

_KERNEL = """
kernel void unpack(
    device OUT* out [[buffer(0)]], device const signed char* weight [[buffer(1)]],
    device const SCALE* scale [[buffer(2)]], device const unsigned char* multiplier [[buffer(3)]],
    constant int& columns [[buffer(4)]], constant int& width [[buffer(5)]], constant int& group_size [[buffer(6)]],
    constant int& groups [[buffer(7)]], uint index [[thread_position_in_grid]])
{
    unpack_byte(out, weight, scale, multiplier, columns, width, group_size, groups, index / width, index % width);
}
"""

METAL_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def definitions(out: str, scale: str, double: bool) -> str:
    """The lines that stand before `BODY`: element types of the result and the scales, and the layout of scales."""
    return f"#define OUT {out}\n#define SCALE {scale}\n#define DOUBLE {int(double)}\n"


def metal_source(dtype: torch.dtype, scale_dtype: torch.dtype, double: bool) -> str:
    """The whole shader.

    Args:
        dtype, scale_dtype (`torch.dtype`): of the result and of the scales.
        double (`bool`): whether group scales are multipliers of a row scale.
    """
    head = "#include <metal_stdlib>\nusing namespace metal;\n"
    return head + definitions(METAL_TYPES[dtype], METAL_TYPES[scale_dtype], double) + BODY + _KERNEL
