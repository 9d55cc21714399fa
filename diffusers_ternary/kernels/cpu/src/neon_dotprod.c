// SPDX-License-Identifier: Apache-2.0
// NEON with dot products (ARMv8.2 FEAT_DotProd): sdot sums four byte products into int32; 4 rows x 16 columns.
#include "neon.h"

#ifdef DT_NEON
#include <string.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))

enum { TILE_ROWS = 4, GEMV_ROWS = 4, DOTPROD_HWCAP = 1 << 20, DOTPROD_WINDOWS = 43 };

static void decode(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                   int32_t columns, int32_t tile_columns, uint8_t *panel) {
    for (int32_t i = 0; i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        const int8x16_t up = dt_up(segment->shift);
        const int32_t first = segment->step > step ? segment->step : step;
        int32_t last = segment->step + segment->steps;
        if (last > step + steps) last = step + steps;
        for (int32_t s = first; s < last; s += 4) {
            const int32_t kept = last - s < 4 ? last - s : 4;
            for (int32_t n = 0; n < tile_columns; n += 4) {
                uint32x4_t r[4], o[4];
                const ptrdiff_t byte = segment->byte + 4 * (ptrdiff_t)(s - segment->step);
                for (int32_t k = 0; k < 4; k++) {
                    r[k] = vreinterpretq_u32_s8(dt_row_codes(plan, weight, weight_end, n + k, columns, byte, up));
                }
                const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1]));
                const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]));
                const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3]));
                const uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]));
                o[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
                o[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
                o[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
                o[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
                for (int32_t k = 0; k < kept; k++) {
                    uint8_t *target = panel + ((ptrdiff_t)(s - step + k) * tile_columns + n) * 4;
                    vst1q_u8(target, vreinterpretq_u8_u32(o[k]));
                }
            }
        }
    }
}

DOTPROD INLINE void run_tile(const dt_tile *t, const dt_run *run, const float *scale, const int rows) {
    const int8_t *w = (const int8_t *)t->panel + (ptrdiff_t)(run->step - t->step) * TILE_COLUMNS * 4;
    const int8_t *x = t->x + 4 * (ptrdiff_t)(run->step - t->step);
    int32x4_t sums[TILE_ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) sums[m][n] = vdupq_n_s32(0);
    }
    int32_t s = 0;
#define STEP(lane)                                                                             \
    do {                                                                                       \
        _Pragma("GCC unroll 4") for (int n = 0; n < 4; n++) {                                  \
            const int8x16_t u = vld1q_s8(w + 64 * (ptrdiff_t)(s + (lane)) + 16 * n);           \
            _Pragma("GCC unroll 4") for (int m = 0; m < rows; m++) {                           \
                sums[m][n] = vdotq_laneq_s32(sums[m][n], u, q[m], lane);                       \
            }                                                                                  \
        }                                                                                      \
    } while (0)
    for (; s + 4 <= run->steps; s += 4) {
        int8x16_t q[TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) q[m] = vld1q_s8(x + m * t->x_stride + 4 * (ptrdiff_t)s);
        STEP(0);
        STEP(1);
        STEP(2);
        STEP(3);
    }
    for (; s < run->steps; s++) {
        int8x16_t q[TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            int32_t four;
            memcpy(&four, x + m * t->x_stride + 4 * (ptrdiff_t)s, 4);
            q[m] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
        STEP(0);
    }
#undef STEP
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            dt_finish(sums[m][n], scale ? scale + 4 * n : NULL, (float *)t->c + m * TILE_COLUMNS + 4 * n);
        }
    }
}

DOTPROD static void tile(const dt_tile *t, int32_t rows) {
    for (int32_t i = 0; i < t->run_count; i++) {
        const dt_run *run = &t->runs[i];
        const float *scale = t->group_scale ? t->group_scale + (ptrdiff_t)run->group * TILE_COLUMNS : NULL;
        if (rows == TILE_ROWS) {
            run_tile(t, run, scale, 4);
        } else {
            run_tile(t, run, scale, 2);
        }
    }
}

// One weight row times up to four rows of x.
DOTPROD INLINE void gemv_row(const dt_gemv *g, int32_t row, int32_t column, const int rows) {
    const uint8_t *w = g->weight + column * g->plane_bytes;
    w = dt_readable(w, g->weight_end, (size_t)g->plane_bytes + 64, g->row_copy);
    int32_t sums[GEMV_ROWS] = {0};
    float32x4_t values[GEMV_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) values[m] = vdupq_n_f32(0.0f);
    for (int32_t i = 0; i < g->run_count; i++) {
        const dt_run *run = &g->runs[i];
        const int8_t *x = g->x + row * g->x_stride + 4 * (ptrdiff_t)run->step;
        const int8x16_t up = dt_up(run->shift);
        int32x4_t lanes[GEMV_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) lanes[m] = vdupq_n_s32(0);
        for (ptrdiff_t k = 0; k < 4 * run->steps; k += 16) {
            const int8x16_t u = dt_codes(vld1q_u8(w + run->byte + k), up);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) lanes[m] = vdotq_s32(lanes[m], u, vld1q_s8(x + m * g->x_stride + k));
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            if (g->group_scale) {
                const float scale = g->group_scale[column * g->groups + run->group];
                values[m] = vfmaq_n_f32(values[m], vcvtq_f32_s32(lanes[m]), scale);
            } else {
                sums[m] += vaddvq_s32(lanes[m]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        const ptrdiff_t at = (ptrdiff_t)(row + m) * g->tile_columns + column;
        if (g->group_scale) {
            ((float *)g->c)[at] = vaddvq_f32(values[m]);
        } else {
            ((int32_t *)g->c)[at] = sums[m];
        }
    }
}

DOTPROD void dt_gemv_neon(const dt_gemv *g) {
    for (int32_t n = 0; n < g->columns; n++) {
        int32_t row = 0;
        for (; row + 4 <= g->rows; row += 4) gemv_row(g, row, n, 4);
        for (; row < g->rows; row++) gemv_row(g, row, n, 1);
    }
}

static int supported(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & DOTPROD_HWCAP) != 0;
#elif defined(__APPLE__)
    return 1;  // every Apple processor with macOS has it
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(DOTPROD_WINDOWS);
#else
    return 0;
#endif
}

const dt_variant dt_neon_dotprod = {
    .name = "neon-dotprod",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 2,
    .tile_columns = TILE_COLUMNS,
    .run_steps = 256,
    .block_steps = 256,
    .gemv_align = 16,
    .gemv_run_steps = 4096,
    .gemv_max_rows = 8,
    .absmax = dt_absmax_neon,
    .quantize = dt_quantize_neon,
    .decode = decode,
    .tile = tile,
    .gemv = dt_gemv_neon,
    .scales = dt_scales_neon,
    .expand = dt_expand_neon,
    .store = dt_store_neon,
};
#endif
