// SPDX-License-Identifier: Apache-2.0
// AVX-512-VNNI: vpdpbusd sums four byte products into int32; 12 rows x 32 columns in 24 accumulators.
#include "ternary.h"

#ifdef DT_X86
#include <immintrin.h>
#include <string.h>

#include "convert.h"

#define INLINE static inline __attribute__((always_inline))
#define TARGET AVX512
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

enum { TILE_ROWS = 12, SHORT_ROWS = 4, TILE_COLUMNS = 32, GEMV_COLUMNS = 4, GEMV_ROWS = 4 };

AVX512 uint32_t dt_absmax_avx512(const void *x, int64_t dtype, int64_t n) {
    if (dtype == DT_FLOAT32) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __m512i a = _mm512_setzero_si512(), b = a;
        const int32_t *p = x;
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            a = _mm512_max_epu32(a, _mm512_and_si512(magnitude, _mm512_loadu_si512(p + i)));
            b = _mm512_max_epu32(b, _mm512_and_si512(magnitude, _mm512_loadu_si512(p + i + 16)));
        }
        for (; i < n; i += 16) {
            const __mmask16 mask = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
            a = _mm512_max_epu32(a, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(mask, p + i)));
        }
        return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
    }
    // of both 16-bit formats the bits grow with the magnitude, NaN above all
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i a = _mm512_setzero_si512();
    const uint16_t *p = x;
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 mask = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
        a = _mm512_max_epu16(a, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi16(mask, p + i)));
    }
    a = _mm512_max_epu16(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(a, 16));
    const uint16_t largest = (uint16_t)_mm512_reduce_max_epu32(a);
    return dtype == DT_BFLOAT16 ? (uint32_t)largest << 16 : dt_bits(dt_from_half(largest));
}

AVX512 INLINE __m512 load16(const void *x, const int64_t dtype, int64_t i, __mmask16 mask) {
    if (dtype == DT_FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
    if (dtype == DT_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 INLINE void quantize(const void *x, const int64_t dtype, int64_t n, const int lifted, float prescale, float inverse,
                            int8_t *q) {
    const __m512 lift = _mm512_set1_ps(prescale), factor = _mm512_set1_ps(inverse);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 mask = n - i < 64 ? (1ull << (n - i)) - 1 : ~0ull;
        __m512i v[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const __m512 value = load16(x, dtype, i + 16 * k, (__mmask16)(mask >> (16 * k)));
            v[k] = _mm512_cvtps_epi32(_mm512_mul_ps(lifted ? _mm512_mul_ps(value, lift) : value, factor));
        }
        const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
        _mm512_mask_storeu_epi8(q + i, mask, _mm512_permutexvar_epi32(order, packed));
    }
}

AVX512 void dt_quantize_avx512(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q) {
    if (prescale != 1.0f) quantize(x, dtype, n, 1, prescale, inverse, q);
    else if (dtype == DT_FLOAT32) quantize(x, DT_FLOAT32, n, 0, prescale, inverse, q);
    else if (dtype == DT_BFLOAT16) quantize(x, DT_BFLOAT16, n, 0, prescale, inverse, q);
    else quantize(x, DT_FLOAT16, n, 0, prescale, inverse, q);
}

int32_t dt_correction_vnni(const int8_t *q, int64_t n) { return -dt_sum_avx2(q, n); }

AVX512 INLINE void finish(__m512i sum, const float *scale, void *c) {
    if (scale) {
        _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale), _mm512_loadu_ps(c)));
    } else {
        _mm512_storeu_si512(c, _mm512_add_epi32(sum, _mm512_loadu_si512(c)));
    }
}

#define STEP_ROW(address, low, high)                     \
    "vpbroadcastd " address ", %%zmm26\n\t"              \
    "vpdpbusd %%zmm26, %%zmm24, %%zmm" low "\n\t"        \
    "vpdpbusd %%zmm26, %%zmm25, %%zmm" high "\n\t"

#define STEP_THREE(pointer, a, b, c, d, e, f)            \
    STEP_ROW("(%[" pointer "])", a, b)                   \
    STEP_ROW("(%[" pointer "], %[stride])", c, d)        \
    STEP_ROW("(%[" pointer "], %[stride], 2)", e, f)

#define START(offset, low, high) \
    "vpbroadcastd " offset "(%[r]), %%zmm" low "\n\tvmovdqa64 %%zmm" low ", %%zmm" high "\n\t"

#define FINISH(low, high, offset)                                    \
    "vpaddd " offset "(%[c]), %%zmm" low ", %%zmm" low "\n\t"        \
    "vmovdqu32 %%zmm" low ", " offset "(%[c])\n\t"                   \
    "vpaddd 64+" offset "(%[c]), %%zmm" high ", %%zmm" high "\n\t"   \
    "vmovdqu32 %%zmm" high ", 64+" offset "(%[c])\n\t"

#define FINISH_SCALED(low, high, offset)                                      \
    "vcvtdq2ps %%zmm" low ", %%zmm" low "\n\t"                                \
    "vfmadd213ps " offset "(%[c]), %%zmm24, %%zmm" low "\n\t"                 \
    "vmovups %%zmm" low ", " offset "(%[c])\n\t"                              \
    "vcvtdq2ps %%zmm" high ", %%zmm" high "\n\t"                              \
    "vfmadd213ps 64+" offset "(%[c]), %%zmm25, %%zmm" high "\n\t"             \
    "vmovups %%zmm" high ", 64+" offset "(%[c])\n\t"

#define ALL_ROWS(macro)                                                                                 \
    macro("0", "1", "0") macro("2", "3", "128") macro("4", "5", "256") macro("6", "7", "384")           \
    macro("8", "9", "512") macro("10", "11", "640") macro("12", "13", "768") macro("14", "15", "896")   \
    macro("16", "17", "1024") macro("18", "19", "1152") macro("20", "21", "1280") macro("22", "23", "1408")

// In assembly with its registers named: from intrinsics gcc spills the accumulators as soon as scales join.
#define FULL_TILE_RUN(finish)                                                                                  \
    __asm__ volatile(                                                                                          \
        START("0", "0", "1") START("4", "2", "3") START("8", "4", "5") START("12", "6", "7")                   \
        START("16", "8", "9") START("20", "10", "11") START("24", "12", "13") START("28", "14", "15")          \
        START("32", "16", "17") START("36", "18", "19") START("40", "20", "21") START("44", "22", "23")        \
        ".p2align 4\n\t"                                                                                       \
        "1:\n\t"                                                                                               \
        "vmovdqa64 (%[w]), %%zmm24\n\t"                                                                        \
        "vmovdqa64 64(%[w]), %%zmm25\n\t"                                                                      \
        STEP_THREE("x0", "0", "1", "2", "3", "4", "5") STEP_THREE("x3", "6", "7", "8", "9", "10", "11")        \
        STEP_THREE("x6", "12", "13", "14", "15", "16", "17") STEP_THREE("x9", "18", "19", "20", "21", "22", "23") \
        "add $128, %[w]\n\t"                                                                                   \
        "add $4, %[x0]\n\t"                                                                                    \
        "add $4, %[x3]\n\t"                                                                                    \
        "add $4, %[x6]\n\t"                                                                                    \
        "add $4, %[x9]\n\t"                                                                                    \
        "dec %[steps]\n\t"                                                                                     \
        "jnz 1b\n\t"                                                                                           \
        finish                                                                                                 \
        : [w] "+r"(w), [x0] "+r"(x0), [x3] "+r"(x3), [x6] "+r"(x6), [x9] "+r"(x9), [steps] "+r"(steps)         \
        : [stride] "r"(t->x_stride), [r] "r"(corrections), [c] "r"(t->c), [scale] "r"(scale)                   \
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",      \
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20",   \
          "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26")

// One run of 12 rows x 32 columns.
AVX512 static void full_run(const dt_tile *t, const dt_run *run, const int32_t *corrections, const float *scale) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x0 = dt_run_x(t, run);
    const int8_t *x3 = x0 + 3 * t->x_stride, *x6 = x0 + 6 * t->x_stride, *x9 = x0 + 9 * t->x_stride;
    ptrdiff_t steps = run->steps;
    if (scale) {
        FULL_TILE_RUN("vmovups (%[scale]), %%zmm24\n\tvmovups 64(%[scale]), %%zmm25\n\t" ALL_ROWS(FINISH_SCALED));
    } else {
        FULL_TILE_RUN(ALL_ROWS(FINISH));
    }
}

// The same for four rows.
AVX512 static void short_run(const dt_tile *t, const dt_run *run, const int32_t *corrections, const float *scale) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x = dt_run_x(t, run);
    __m512i low[4], high[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) low[m] = high[m] = _mm512_set1_epi32(corrections[m]);
    for (int32_t s = 0; s < run->steps; s++) {
        const __m512i w0 = _mm512_load_si512(w + 128 * s);
        const __m512i w1 = _mm512_load_si512(w + 128 * s + 64);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            int32_t four;
            memcpy(&four, x + m * t->x_stride + 4 * s, 4);
            low[m] = _mm512_dpbusd_epi32(low[m], w0, _mm512_set1_epi32(four));
            high[m] = _mm512_dpbusd_epi32(high[m], w1, _mm512_set1_epi32(four));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
        float *c = (float *)t->c + m * TILE_COLUMNS;
        finish(low[m], scale, c);
        finish(high[m], scale ? scale + 16 : NULL, c + 16);
    }
}

#include "vnni.h"

// One run of `columns` weight rows times `rows` rows of x. The codes stay at their bit position,
// (byte + (1 << shift)) & (3 << shift) = u << shift, and the exact sums are shifted back once.
AVX512 INLINE void gemv_run(const uint8_t *const w[GEMV_COLUMNS], const int8_t *x, ptrdiff_t x_stride,
                                 const dt_run *run, const int columns, const int rows, __m512i *out) {
    const __m512i one = _mm512_set1_epi8((char)(1 << run->shift));
    const __m512i mask = _mm512_set1_epi8((char)(3 << run->shift));
    __m512i sums[GEMV_COLUMNS * GEMV_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) sums[i] = _mm512_setzero_si512();
    for (ptrdiff_t k = 0; k < 4 * run->steps; k += 64) {
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            const __m512i packed = _mm512_loadu_si512(w[n] + run->byte + k);
            const __m512i u = _mm512_and_si512(_mm512_add_epi8(packed, one), mask);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                sums[n * rows + m] = _mm512_dpbusd_epi32(sums[n * rows + m], u, _mm512_loadu_si512(x + m * x_stride + k));
            }
        }
    }
    const __m128i shift = _mm_cvtsi32_si128(run->shift);
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) out[i] = _mm512_sra_epi32(sums[i], shift);
}

AVX512 INLINE void gemv_block(const dt_gemv *g, int32_t row, int32_t column, const int rows, const int columns,
                                   const int scaled) {
    const uint8_t *w[GEMV_COLUMNS];
    __m512i sums[GEMV_COLUMNS * GEMV_ROWS];
    __m512 values[GEMV_COLUMNS * GEMV_ROWS];
#pragma GCC unroll 4
    for (int n = 0; n < columns; n++) w[n] = g->weight + (column + n) * g->plane_bytes;
    if (columns == 1) w[0] = dt_readable(w[0], g->weight_end, (size_t)g->plane_bytes + 64, g->row_copy);
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) {
        sums[i] = _mm512_setzero_si512();
        values[i] = _mm512_setzero_ps();
    }
    for (int32_t i = 0; i < g->run_count; i++) {
        const dt_run *run = &g->runs[i];
        __m512i lanes[GEMV_COLUMNS * GEMV_ROWS];
        gemv_run(w, g->x + row * g->x_stride + 4 * (ptrdiff_t)run->step, g->x_stride, run, columns, rows, lanes);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            // the surplus joins one lane, so every lane stays an exact integer
            const __m512i surplus =
                _mm512_zextsi128_si512(_mm_cvtsi32_si128(g->correction[(row + m) * g->correction_stride + i]));
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) {
                const int at = n * rows + m;
                const __m512i sum = _mm512_add_epi32(lanes[at], surplus);
                if (scaled) {
                    const __m512 scale = _mm512_set1_ps(g->group_scale[(column + n) * g->groups + run->group]);
                    values[at] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, values[at]);
                } else {
                    sums[at] = _mm512_add_epi32(sums[at], sum);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < columns; n++) {
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const ptrdiff_t at = (ptrdiff_t)(row + m) * g->tile_columns + column + n;
            if (scaled) {
                ((float *)g->c)[at] = _mm512_reduce_add_ps(values[n * rows + m]);
            } else {
                ((int32_t *)g->c)[at] = _mm512_reduce_add_epi32(sums[n * rows + m]);
            }
        }
    }
}

AVX512 INLINE void gemv_columns(const dt_gemv *g, int32_t column, const int columns, const int scaled) {
    int32_t row = 0;
    for (; row + 4 <= g->rows; row += 4) gemv_block(g, row, column, 4, columns, scaled);
    for (; row + 2 <= g->rows; row += 2) gemv_block(g, row, column, 2, columns, scaled);
    if (row < g->rows) gemv_block(g, row, column, 1, columns, scaled);
}

AVX512 void dt_gemv_avx512(const dt_gemv *g) {
    int32_t n = 0;
    while (n < g->columns) {
        const uint8_t *end = g->weight + (n + GEMV_COLUMNS) * g->plane_bytes + 64;
        if (n + GEMV_COLUMNS <= g->columns && end <= g->weight_end) {
            if (g->group_scale) gemv_columns(g, n, GEMV_COLUMNS, 1);
            else gemv_columns(g, n, GEMV_COLUMNS, 0);
            n += GEMV_COLUMNS;
        } else {
            if (g->group_scale) gemv_columns(g, n, 1, 1);
            else gemv_columns(g, n, 1, 0);
            n += 1;
        }
    }
}

static int supported(void) { return dt_x86_has(DT_X86_AVX512_VNNI); }

const dt_variant dt_avx512_vnni = {
    .name = "avx512-vnni",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 4,
    .tile_columns = TILE_COLUMNS,
    .run_steps = 256,
    .block_steps = 256,
    .gemv_align = 64,
    .gemv_run_steps = 4096,
    .gemv_max_rows = 4,
    .absmax = dt_absmax_avx512,
    .quantize = dt_quantize_avx512,
    .sum = dt_sum_avx2,
    .correction = dt_correction_vnni,
    .decode = dt_decode_avx2,
    .tile = tile,
    .gemv = dt_gemv_avx512,
    .scales = dt_scales_avx2,
    .expand = dt_expand_avx2,
    .store = dt_store_avx2,
};
#endif
