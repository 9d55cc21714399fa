// SPDX-License-Identifier: Apache-2.0
// What the variants of AArch64 share. smmla and sdot multiply signed bytes, so panels hold the codes themselves and no
// surplus is taken off.
#ifndef DIFFUSERS_TERNARY_NEON_H
#define DIFFUSERS_TERNARY_NEON_H

#include "ternary.h"

#ifdef DT_NEON
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

enum { TILE_COLUMNS = 16 };

// Codes of 16 packed bytes at the bit position that `up` moves to the top.
INLINE int8x16_t dt_codes(uint8x16_t bytes, int8x16_t up) {
    return vshrq_n_s8(vreinterpretq_s8_u8(vshlq_u8(bytes, up)), 6);
}

INLINE int8x16_t dt_up(int32_t shift) { return vdupq_n_s8((int8_t)(6 - shift)); }

// Codes of 16 packed bytes of row `row`; rows past the last repeat it: never stored, but they must be readable.
INLINE int8x16_t dt_row_codes(const dt_plan *plan, const uint8_t *weight, const uint8_t *weight_end, int32_t row,
                              int32_t columns, ptrdiff_t byte, int8x16_t up) {
    const uint8_t *source = weight + (row < columns ? row : columns - 1) * plan->plane_bytes + byte;
    uint8_t copy[16];
    return dt_codes(vld1q_u8(weight_end - source >= 16 ? source : dt_readable(source, weight_end, 16, copy)), up);
}

// Sums of four columns join their accumulators.
INLINE void dt_finish(int32x4_t sum, const float *scale, void *c) {
    if (scale) {
        vst1q_f32(c, vfmaq_f32(vld1q_f32(c), vcvtq_f32_s32(sum), vld1q_f32(scale)));
    } else {
        vst1q_s32(c, vaddq_s32(sum, vld1q_s32(c)));
    }
}

uint32_t dt_absmax_neon(const void *x, int64_t dtype, int64_t n);
void dt_quantize_neon(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q);
void dt_gemv_neon(const dt_gemv *g);
void dt_scales_neon(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out);
void dt_expand_neon(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out);
void dt_store_neon(const void *c, const float *column_scale, float row_scale, const float *bias, void *out, int64_t dtype,
                   int32_t columns);

#endif
#endif
