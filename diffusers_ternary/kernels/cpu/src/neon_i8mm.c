// SPDX-License-Identifier: Apache-2.0
// NEON with FEAT_I8MM: smmla multiplies 2 rows x 8 bytes by 8 bytes x 2 columns; 6 rows x 16 columns of output.
// Rows of x lie in pairs, eight bytes of one and eight of the other; a panel holds eight bytes of each column in turn.
#include "neon.h"

#ifdef DT_NEON
#include <string.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

#define I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))

enum { TILE_ROWS = 6, PAIR_BYTES = 8, TWO_STEPS = PAIR_BYTES * TILE_COLUMNS, I8MM_HWCAP2 = 1 << 13, I8MM_WINDOWS = 66 };

static void decode(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                   int32_t columns, int32_t tile_columns, uint8_t *panel) {
    for (int32_t i = 0; i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        const int8x16_t up = dt_up(segment->shift);
        int32_t s = segment->step > step ? segment->step : step;
        int32_t last = segment->step + segment->steps;
        if (last > step + steps) last = step + steps;
        for (int32_t kept; s < last; s += kept) {
            const int32_t at = s - step;
            kept = at % 2 ? 1 : last - s < 4 ? last - s : 4;
            const ptrdiff_t byte = segment->byte + 4 * (ptrdiff_t)(s - segment->step);
            for (int32_t n = 0; n < tile_columns; n += 2) {
                uint8_t *target = panel + (ptrdiff_t)(at / 2) * TWO_STEPS + n * PAIR_BYTES;
                const int64x2_t even = vreinterpretq_s64_s8(dt_row_codes(plan, weight, weight_end, n, columns, byte, up));
                const int64x2_t odd = vreinterpretq_s64_s8(dt_row_codes(plan, weight, weight_end, n + 1, columns, byte, up));
                if (kept == 4) {
                    vst1q_s64((int64_t *)target, vtrn1q_s64(even, odd));
                    vst1q_s64((int64_t *)(target + TWO_STEPS), vtrn2q_s64(even, odd));
                    continue;
                }
                uint8_t codes[2][16];
                vst1q_s64((int64_t *)codes[0], even);
                vst1q_s64((int64_t *)codes[1], odd);
                for (int32_t k = 0; k < kept; k++) {
                    uint8_t *step_target = target + (at % 2 + k) / 2 * TWO_STEPS + (at + k) % 2 * 4;
                    memcpy(step_target, codes[0] + 4 * k, 4);
                    memcpy(step_target + PAIR_BYTES, codes[1] + 4 * k, 4);
                }
            }
        }
    }
}

// Each accumulator holds two columns of a pair's even row, then two of its odd one.
INLINE void finish_pair(const int32x4_t sums[8], const float *scale, float *c) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        const int64x2_t low = vreinterpretq_s64_s32(sums[2 * n]), high = vreinterpretq_s64_s32(sums[2 * n + 1]);
        const float *four = scale ? scale + 4 * n : NULL;
        dt_finish(vreinterpretq_s32_s64(vtrn1q_s64(low, high)), four, c + 4 * n);
        dt_finish(vreinterpretq_s32_s64(vtrn2q_s64(low, high)), four, c + TILE_COLUMNS + 4 * n);
    }
}

#define ZERO(a, b, c) "movi v" a ".4s, #0\n\tmovi v" b ".4s, #0\n\tmovi v" c ".4s, #0\n\t"

#define COLUMN_PAIR(codes, a, b, c)              \
    "smmla v" a ".4s, v24.16b, v" codes ".16b\n\t" \
    "smmla v" b ".4s, v25.16b, v" codes ".16b\n\t" \
    "smmla v" c ".4s, v26.16b, v" codes ".16b\n\t"

#define FOUR_COLUMNS(macro, a, b, c, d, e, f) \
    "ldp q27, q28, [%[w]], #32\n\t" macro("27", a, b, c) macro("28", d, e, f)

// Three pairs of rows. In assembly with its registers named: from intrinsics gcc spills four of the accumulators.
I8MM static void full_run(const dt_tile *t, const dt_run *run, const float *scale) {
    const int8_t *w = (const int8_t *)t->panel + (ptrdiff_t)(run->step - t->step) * TILE_COLUMNS * 4;
    const int8_t *x0 = t->x + 8 * (ptrdiff_t)(run->step - t->step);
    const int8_t *x1 = x0 + 2 * t->x_stride, *x2 = x1 + 2 * t->x_stride;
    ptrdiff_t steps = run->steps;
    int32x4_t sums[3][8];
    __asm__ volatile(
        ZERO("0", "1", "2") ZERO("3", "4", "5") ZERO("6", "7", "8") ZERO("9", "10", "11")
        ZERO("12", "13", "14") ZERO("15", "16", "17") ZERO("18", "19", "20") ZERO("21", "22", "23")
        "1:\n\t"
        "ldr q24, [%[x0]], #16\n\t"
        "ldr q25, [%[x1]], #16\n\t"
        "ldr q26, [%[x2]], #16\n\t"
        FOUR_COLUMNS(COLUMN_PAIR, "0", "8", "16", "1", "9", "17")
        FOUR_COLUMNS(COLUMN_PAIR, "2", "10", "18", "3", "11", "19")
        FOUR_COLUMNS(COLUMN_PAIR, "4", "12", "20", "5", "13", "21")
        FOUR_COLUMNS(COLUMN_PAIR, "6", "14", "22", "7", "15", "23")
        "subs %[steps], %[steps], #2\n\t"
        "b.gt 1b\n\t"
        "stp q0, q1, [%[sums]]\n\tstp q2, q3, [%[sums], #32]\n\t"
        "stp q4, q5, [%[sums], #64]\n\tstp q6, q7, [%[sums], #96]\n\t"
        "stp q8, q9, [%[sums], #128]\n\tstp q10, q11, [%[sums], #160]\n\t"
        "stp q12, q13, [%[sums], #192]\n\tstp q14, q15, [%[sums], #224]\n\t"
        "stp q16, q17, [%[sums], #256]\n\tstp q18, q19, [%[sums], #288]\n\t"
        "stp q20, q21, [%[sums], #320]\n\tstp q22, q23, [%[sums], #352]\n\t"
        : [w] "+r"(w), [x0] "+r"(x0), [x1] "+r"(x1), [x2] "+r"(x2), [steps] "+r"(steps)
        : [sums] "r"(sums)
        : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14",
          "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28");
    for (int p = 0; p < 3; p++) finish_pair(sums[p], scale, (float *)t->c + 2 * p * TILE_COLUMNS);
}

// One or two pairs.
I8MM INLINE void short_run(const dt_tile *t, const dt_run *run, const float *scale, const int pairs) {
    const int8_t *w = (const int8_t *)t->panel + (ptrdiff_t)(run->step - t->step) * TILE_COLUMNS * 4;
    const int8_t *x = t->x + 8 * (ptrdiff_t)(run->step - t->step);
    int32x4_t sums[2][8];
#pragma GCC unroll 2
    for (int p = 0; p < pairs; p++) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) sums[p][n] = vdupq_n_s32(0);
    }
    for (int32_t s = 0; s < run->steps; s += 2, w += TWO_STEPS, x += 2 * PAIR_BYTES) {
        int8x16_t q[2];
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) q[p] = vld1q_s8(x + 2 * p * t->x_stride);
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {
            const int8x16_t codes = vld1q_s8(w + 16 * n);
#pragma GCC unroll 2
            for (int p = 0; p < pairs; p++) sums[p][n] = vmmlaq_s32(sums[p][n], q[p], codes);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < pairs; p++) finish_pair(sums[p], scale, (float *)t->c + 2 * p * TILE_COLUMNS);
}

// A run of an odd length ends with a step whose x is zero.
I8MM static void tile(const dt_tile *t, int32_t rows) {
    for (int32_t i = 0; i < t->run_count; i++) {
        const dt_run *run = &t->runs[i];
        const float *scale = t->group_scale ? t->group_scale + (ptrdiff_t)run->group * TILE_COLUMNS : NULL;
        if (rows == TILE_ROWS) full_run(t, run, scale);
        else if (rows == 4) short_run(t, run, scale, 2);
        else short_run(t, run, scale, 1);
    }
}

static int supported(void) {
#if defined(__linux__)
    return dt_neon_dotprod.supported() && (getauxval(AT_HWCAP2) & I8MM_HWCAP2) != 0;
#elif defined(__APPLE__)
    int present = 0;
    size_t size = sizeof(present);
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &present, &size, NULL, 0) == 0 && present;
#elif defined(_WIN32)
    return dt_neon_dotprod.supported() && IsProcessorFeaturePresent(I8MM_WINDOWS);
#else
    return 0;
#endif
}

const dt_variant dt_neon_i8mm = {
    .name = "neon-i8mm",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 2,
    .tile_columns = TILE_COLUMNS,
    .run_steps = 256,
    .block_steps = 256,
    .gemv_align = 16,
    .gemv_run_steps = 4096,
    .gemv_max_rows = 8,
    .group_steps = 2,
    .x_rows = 2,
    .x_bytes = PAIR_BYTES,
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
