// SPDX-License-Identifier: Apache-2.0
// AArch64: what surrounds the products, for every variant: quantization, scales, the dense weight, the output.
#include "neon.h"

#ifdef DT_NEON
#include "convert.h"

INLINE float32x4_t load4(const void *x, const int64_t dtype, int64_t i) {
    if (dtype == DT_FLOAT32) return vld1q_f32((const float *)x + i);
    const uint16x4_t half = vld1_u16((const uint16_t *)x + i);
    return dtype == DT_BFLOAT16 ? vreinterpretq_f32_u32(vshll_n_u16(half, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(half));
}

INLINE void store4(void *out, const int64_t dtype, int64_t i, float32x4_t value) {
    if (dtype == DT_FLOAT32) {
        vst1q_f32((float *)out + i, value);
    } else if (dtype == DT_FLOAT16) {
        vst1_u16((uint16_t *)out + i, vreinterpret_u16_f16(vcvt_f16_f32(value)));
    } else {
        const uint32x4_t bits = vreinterpretq_u32_f32(value);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        vst1_u16((uint16_t *)out + i, vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16));
    }
}

uint32_t dt_absmax_neon(const void *x, int64_t dtype, int64_t n) {
    int64_t i = 0;
    if (dtype == DT_FLOAT32) {
        uint32x4_t largest = vdupq_n_u32(0);
        for (; i + 4 <= n; i += 4) {
            const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32((const float *)x + i));
            largest = vmaxq_u32(largest, vandq_u32(bits, vdupq_n_u32(0x7fffffffu)));
        }
        const uint32_t tail = dt_absmax_scalar((const float *)x + i, dtype, n - i);
        return vmaxvq_u32(largest) > tail ? vmaxvq_u32(largest) : tail;
    }
    uint16x8_t largest = vdupq_n_u16(0);  // halves order like their bits as well
    for (; i + 8 <= n; i += 8) {
        largest = vmaxq_u16(largest, vandq_u16(vld1q_u16((const uint16_t *)x + i), vdupq_n_u16(0x7fff)));
    }
    const uint16_t half = vmaxvq_u16(largest);
    const uint32_t bits = dt_absmax_scalar(&half, dtype, 1);
    const uint32_t tail = dt_absmax_scalar((const uint16_t *)x + i, dtype, n - i);
    return bits > tail ? bits : tail;
}

INLINE void quantize(const int64_t dtype, const void *x, int64_t n, float prescale, float inverse, int8_t *q) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        int16x4_t part[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const float32x4_t value = vmulq_n_f32(vmulq_n_f32(load4(x, dtype, i + 4 * k), prescale), inverse);
            part[k] = vmovn_s32(vcvtnq_s32_f32(value));
        }
        const int8x8_t low = vmovn_s16(vcombine_s16(part[0], part[1]));
        vst1q_s8(q + i, vcombine_s8(low, vmovn_s16(vcombine_s16(part[2], part[3]))));
    }
    const char *rest = (const char *)x + i * (dtype == DT_FLOAT32 ? 4 : 2);
    dt_quantize_scalar(rest, dtype, n - i, prescale, inverse, q + i);
}

// Calls an inline function with its dtype as a constant.
#define WITH_DTYPE(function, ...)                                     \
    do {                                                              \
        if (dtype == DT_FLOAT32) function(DT_FLOAT32, __VA_ARGS__);   \
        else if (dtype == DT_BFLOAT16) function(DT_BFLOAT16, __VA_ARGS__); \
        else function(DT_FLOAT16, __VA_ARGS__);                       \
    } while (0)

void dt_quantize_neon(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q) {
    WITH_DTYPE(quantize, x, n, prescale, inverse, q);
}

// (scale * multiplier) / 63 of each group, where there is a multiplier.
INLINE void scales(const int64_t dtype, const void *scale, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out) {
    int64_t i = 0;
    for (; !multiplier && i + 4 <= rows * groups; i += 4) vst1q_f32(out + i, load4(scale, dtype, i));
    if (!multiplier) dt_scales_scalar((const char *)scale + i * (dtype == DT_FLOAT32 ? 4 : 2), dtype, NULL, 1, rows * groups - i, out + i);
    for (int64_t row = 0; multiplier && row < rows; row++) {
        const float row_scale = dt_load(scale, dtype, row);
        const uint8_t *m = multiplier + row * groups;
        int64_t g = 0;
        for (; g + 8 <= groups; g += 8) {
            const uint16x8_t wide = vmovl_u8(vld1_u8(m + g));
            const float32x4_t low = vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
            const float32x4_t high = vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)));
            vst1q_f32(out + row * groups + g, vdivq_f32(vmulq_n_f32(low, row_scale), vdupq_n_f32(63.0f)));
            vst1q_f32(out + row * groups + g + 4, vdivq_f32(vmulq_n_f32(high, row_scale), vdupq_n_f32(63.0f)));
        }
        dt_scales_scalar(&row_scale, DT_FLOAT32, m + g, 1, groups - g, out + row * groups + g);
    }
}

void dt_scales_neon(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out) {
    WITH_DTYPE(scales, scale, multiplier, rows, groups, out);
}

void dt_expand_neon(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out) {
    const int8x16_t up = dt_up(shift);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const int8x16_t code = dt_codes(vld1q_u8(bytes + i), up);
        const int16x8_t low = vmovl_s8(vget_low_s8(code)), high = vmovl_s8(vget_high_s8(code));
        vst1q_f32(out + i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), scale));
        vst1q_f32(out + i + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))), scale));
        vst1q_f32(out + i + 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), scale));
        vst1q_f32(out + i + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))), scale));
    }
    dt_expand_scalar(bytes + i, n - i, shift, scale, out + i);
}

INLINE void store(const int64_t dtype, const void *c, const float *column_scale, float row_scale, const float *bias,
                  void *out, int32_t columns) {
    for (int32_t n = 0; n + 4 <= columns; n += 4) {
        const float32x4_t value = column_scale ? vmulq_f32(vcvtq_f32_s32(vld1q_s32((const int32_t *)c + n)), vld1q_f32(column_scale + n))
                                               : vld1q_f32((const float *)c + n);
        store4(out, dtype, n, vfmaq_n_f32(bias ? vld1q_f32(bias + n) : vdupq_n_f32(0.0f), value, row_scale));
    }
    const int32_t n = columns / 4 * 4;
    dt_store_scalar((const float *)c + n, column_scale ? column_scale + n : NULL, row_scale, bias ? bias + n : NULL,
                    (char *)out + n * (dtype == DT_FLOAT32 ? 4 : 2), dtype, columns - n);
}

void dt_store_neon(const void *c, const float *column_scale, float row_scale, const float *bias, void *out, int64_t dtype,
                   int32_t columns) {
    WITH_DTYPE(store, c, column_scale, row_scale, bias, out, columns);
}
#endif
