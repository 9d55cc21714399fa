// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI: vpdpbusd of 256 bits, for CPUs without AVX-512; 6 rows x 16 columns in 12 accumulators.
#include "ternary.h"

#ifdef DT_X86
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TARGET AVXVNNI
#define AVXVNNI __attribute__((target("avxvnni,avx2,fma,f16c")))

enum { TILE_ROWS = 6, SHORT_ROWS = 2, TILE_COLUMNS = 16 };

AVXVNNI INLINE void finish(__m256i sum, const float *scale, void *c) {
    if (scale) {
        _mm256_storeu_ps(c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scale), _mm256_loadu_ps(c)));
    } else {
        _mm256_storeu_si256(c, _mm256_add_epi32(sum, _mm256_loadu_si256(c)));
    }
}

#define STEP_ROW(address, low, high)                           \
    "vpbroadcastd " address ", %%ymm14\n\t"                    \
    "%{vex%} vpdpbusd %%ymm14, %%ymm12, %%ymm" low "\n\t"        \
    "%{vex%} vpdpbusd %%ymm14, %%ymm13, %%ymm" high "\n\t"

#define START(offset, low, high) \
    "vpbroadcastd " offset "(%[r]), %%ymm" low "\n\tvmovdqa %%ymm" low ", %%ymm" high "\n\t"

#define FINISH(low, high, offset)                                    \
    "vpaddd " offset "(%[c]), %%ymm" low ", %%ymm" low "\n\t"        \
    "vmovdqu %%ymm" low ", " offset "(%[c])\n\t"                     \
    "vpaddd 32+" offset "(%[c]), %%ymm" high ", %%ymm" high "\n\t"   \
    "vmovdqu %%ymm" high ", 32+" offset "(%[c])\n\t"

#define FINISH_SCALED(low, high, offset)                                      \
    "vcvtdq2ps %%ymm" low ", %%ymm" low "\n\t"                                \
    "vfmadd213ps " offset "(%[c]), %%ymm12, %%ymm" low "\n\t"                 \
    "vmovups %%ymm" low ", " offset "(%[c])\n\t"                              \
    "vcvtdq2ps %%ymm" high ", %%ymm" high "\n\t"                              \
    "vfmadd213ps 32+" offset "(%[c]), %%ymm13, %%ymm" high "\n\t"             \
    "vmovups %%ymm" high ", 32+" offset "(%[c])\n\t"

#define ALL_ROWS(macro)                                                                \
    macro("0", "1", "0") macro("2", "3", "64") macro("4", "5", "128")                  \
    macro("6", "7", "192") macro("8", "9", "256") macro("10", "11", "320")

// In assembly with its registers named: from intrinsics gcc spills the accumulators as soon as scales join.
#define FULL_TILE_RUN(finish)                                                                                  \
    __asm__ volatile(                                                                                          \
        START("0", "0", "1") START("4", "2", "3") START("8", "4", "5")                                         \
        START("12", "6", "7") START("16", "8", "9") START("20", "10", "11")                                    \
        ".p2align 4\n\t"                                                                                       \
        "1:\n\t"                                                                                               \
        "vmovdqa (%[w]), %%ymm12\n\t"                                                                          \
        "vmovdqa 32(%[w]), %%ymm13\n\t"                                                                        \
        STEP_ROW("(%[x])", "0", "1") STEP_ROW("(%[x], %[stride])", "2", "3")                                   \
        STEP_ROW("(%[x], %[stride], 2)", "4", "5") STEP_ROW("(%[x3])", "6", "7")                               \
        STEP_ROW("(%[x3], %[stride])", "8", "9") STEP_ROW("(%[x3], %[stride], 2)", "10", "11")                 \
        "add $64, %[w]\n\t"                                                                                    \
        "add $4, %[x]\n\t"                                                                                     \
        "add $4, %[x3]\n\t"                                                                                    \
        "dec %[steps]\n\t"                                                                                     \
        "jnz 1b\n\t"                                                                                           \
        finish                                                                                                 \
        : [w] "+r"(w), [x] "+r"(x), [x3] "+r"(x3), [steps] "+r"(steps)                                         \
        : [stride] "r"(t->x_stride), [r] "r"(corrections), [c] "r"(t->c), [scale] "r"(scale)                   \
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",      \
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14")

// One run of 6 rows x 16 columns.
AVXVNNI static void full_run(const dt_tile *t, const dt_run *run, const int32_t *corrections, const float *scale) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x = dt_run_x(t, run);
    const int8_t *x3 = x + 3 * t->x_stride;
    ptrdiff_t steps = run->steps;
    if (scale) {
        FULL_TILE_RUN("vmovups (%[scale]), %%ymm12\n\tvmovups 32(%[scale]), %%ymm13\n\t" ALL_ROWS(FINISH_SCALED));
    } else {
        FULL_TILE_RUN(ALL_ROWS(FINISH));
    }
}

// The same for two rows.
AVXVNNI static void short_run(const dt_tile *t, const dt_run *run, const int32_t *corrections, const float *scale) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x = dt_run_x(t, run);
    __m256i low[2], high[2];
#pragma GCC unroll 2
    for (int m = 0; m < 2; m++) low[m] = high[m] = _mm256_set1_epi32(corrections[m]);
    for (int32_t s = 0; s < run->steps; s++) {
        const __m256i w0 = _mm256_load_si256((const __m256i *)(w + 64 * s));
        const __m256i w1 = _mm256_load_si256((const __m256i *)(w + 64 * s + 32));
#pragma GCC unroll 2
        for (int m = 0; m < 2; m++) {
            int32_t four;
            memcpy(&four, x + m * t->x_stride + 4 * s, 4);
            low[m] = _mm256_dpbusd_avx_epi32(low[m], w0, _mm256_set1_epi32(four));
            high[m] = _mm256_dpbusd_avx_epi32(high[m], w1, _mm256_set1_epi32(four));
        }
    }
#pragma GCC unroll 2
    for (int m = 0; m < 2; m++) {
        float *c = (float *)t->c + m * TILE_COLUMNS;
        finish(low[m], scale, c);
        finish(high[m], scale ? scale + 8 : NULL, c + 8);
    }
}

#include "vnni.h"

static int supported(void) { return dt_x86_has(DT_X86_AVX_VNNI); }

const dt_variant dt_avx_vnni = {
    .name = "avx-vnni",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 2,
    .tile_columns = TILE_COLUMNS,
    .run_steps = 256,
    .block_steps = 256,
    .gemv_align = 32,
    .gemv_run_steps = 512,
    .gemv_max_rows = 8,
    .absmax = dt_absmax_avx2,
    .quantize = dt_quantize_avx2,
    .sum = dt_sum_avx2,
    .correction = dt_correction_vnni,
    .decode = dt_decode_avx2,
    .tile = tile,
    .gemv = dt_gemv_avx2,  // bound by decode and memory, not by products
    .scales = dt_scales_avx2,
    .expand = dt_expand_avx2,
    .store = dt_store_avx2,
};
#endif
