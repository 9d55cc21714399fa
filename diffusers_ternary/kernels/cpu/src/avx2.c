// SPDX-License-Identifier: Apache-2.0
// AVX2: vpmaddubsw pairs summed in int16 and widened once a run. A lane starts at minus the sum of the x that it
// will meet, so it ends at sum(t * x); 128 steps of two columns reach 128 * 2 * 127 = 32,512, which fits int16,
// and what wraps on the way there wraps back.
#include "ternary.h"

#ifdef DT_X86
#include <immintrin.h>
#include <string.h>

#include "convert.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))

enum { TILE_ROWS = 6, TILE_COLUMNS = 16, RUN_STEPS = 128, GEMV_ROWS = 4, GEMV_COLUMNS = 4 };

AVX2 INLINE __m256 load8(const void *x, int64_t dtype, int64_t i) {
    if (dtype == DT_FLOAT32) return _mm256_loadu_ps((const float *)x + i);
    const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == DT_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 INLINE uint32_t absmax(const void *x, const int64_t dtype, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i a = _mm256_setzero_si256(), b = a;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        a = _mm256_max_epu32(a, _mm256_and_si256(magnitude, _mm256_castps_si256(load8(x, dtype, i))));
        b = _mm256_max_epu32(b, _mm256_and_si256(magnitude, _mm256_castps_si256(load8(x, dtype, i + 8))));
    }
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_max_epu32(a, b));
    for (int k = 0; k < 8; k++) largest = lanes[k] > largest ? lanes[k] : largest;
    const char *rest = (const char *)x + i * (dtype == DT_FLOAT32 ? 4 : 2);
    const uint32_t tail = dt_absmax_scalar(rest, dtype, n - i);
    return tail > largest ? tail : largest;
}

AVX2 uint32_t dt_absmax_avx2(const void *x, int64_t dtype, int64_t n) {
    if (dtype == DT_FLOAT32) return absmax(x, DT_FLOAT32, n);
    return dtype == DT_BFLOAT16 ? absmax(x, DT_BFLOAT16, n) : absmax(x, DT_FLOAT16, n);
}

AVX2 INLINE void quantize(const void *x, const int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q) {
    const __m256 lift = _mm256_set1_ps(prescale), factor = _mm256_set1_ps(inverse);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i v[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            v[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(load8(x, dtype, i + 8 * k), lift), factor));
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    const char *rest = (const char *)x + i * (dtype == DT_FLOAT32 ? 4 : 2);
    dt_quantize_scalar(rest, dtype, n - i, prescale, inverse, q + i);
}

AVX2 void dt_quantize_avx2(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q) {
    if (dtype == DT_FLOAT32) {
        quantize(x, DT_FLOAT32, n, prescale, inverse, q);
    } else if (dtype == DT_BFLOAT16) {
        quantize(x, DT_BFLOAT16, n, prescale, inverse, q);
    } else {
        quantize(x, DT_FLOAT16, n, prescale, inverse, q);
    }
}

AVX2 int32_t dt_sum_avx2(const int8_t *q, int64_t n) {
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *)(q + i)));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    return _mm_cvtsi128_si32(sum) + dt_sum_scalar(q + i, n - i);
}

// Minus the sums of the first and of the last two of every four columns, as two int16.
AVX2 static int32_t correction(const int8_t *q, int64_t n) {
    __m256i pairs = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)(q + i));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), x));
    }
    int16_t lanes[16];
    _mm256_storeu_si256((__m256i *)lanes, pairs);
    int32_t first = 0, last = 0;
    for (int k = 0; k < 16; k += 2) {
        first += lanes[k];
        last += lanes[k + 1];
    }
    for (; i < n; i += 4) {
        first += q[i] + q[i + 1];
        last += q[i + 2] + q[i + 3];
    }
    return (int32_t)(((uint32_t)-first & 0xffffu) | ((uint32_t)-last << 16));
}

// Codes of 32 packed bytes at one bit position, as u = t + 1.
AVX2 INLINE __m256i codes(__m256i bytes, const int shift) {
    const __m256i moved = shift ? _mm256_srli_epi16(bytes, shift) : bytes;
    return _mm256_and_si256(_mm256_add_epi8(moved, _mm256_set1_epi8(1)), _mm256_set1_epi8(3));
}

// Eight rows x 32 bytes to eight vectors of [8 rows][4 columns].
AVX2 INLINE void transpose(__m256i r[8]) {
    __m256i t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

AVX2 INLINE void decode_steps(const uint8_t *rows[8], const uint8_t *end, int32_t steps, const int shift,
                              int32_t tile_columns, uint8_t *panel) {
    // rows are in ascending order: where the last may be read in whole, none needs a copy
    const int whole = rows[7] + 4 * ((ptrdiff_t)steps + 7) / 8 * 8 + 32 <= end;
    for (int32_t s = 0; s < steps; s += 8) {
        __m256i r[8];
        uint8_t copy[32];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const uint8_t *source = rows[i] + 4 * s;
            r[i] = _mm256_loadu_si256((const __m256i *)(whole ? source : dt_readable(source, end, 32, copy)));
        }
        transpose(r);
        const int32_t kept = steps - s < 8 ? steps - s : 8;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (i >= kept) break;
            _mm256_storeu_si256((__m256i *)(panel + (ptrdiff_t)(s + i) * tile_columns * 4), codes(r[i], shift));
        }
    }
}

AVX2 void dt_decode_avx2(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                         int32_t columns, int32_t tile_columns, uint8_t *panel) {
    for (int32_t i = 0; i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        const int32_t first = segment->step > step ? segment->step : step;
        int32_t last = segment->step + segment->steps;
        if (last > step + steps) last = step + steps;
        if (first >= last) continue;
        const int32_t byte = segment->byte + 4 * (first - segment->step);
        for (int32_t n = 0; n < tile_columns; n += 8) {
            const uint8_t *rows[8];
            for (int32_t k = 0; k < 8; k++) {
                // columns past the end repeat the last row: never stored, but they must be readable
                const int32_t row = n + k < columns ? n + k : columns - 1;
                rows[k] = weight + row * plan->plane_bytes + byte;
            }
            uint8_t *target = panel + ((ptrdiff_t)(first - step) * tile_columns + n) * 4;
            switch (segment->shift) {
                case 0: decode_steps(rows, weight_end, last - first, 0, tile_columns, target); break;
                case 2: decode_steps(rows, weight_end, last - first, 2, tile_columns, target); break;
                case 4: decode_steps(rows, weight_end, last - first, 4, tile_columns, target); break;
                default: decode_steps(rows, weight_end, last - first, 6, tile_columns, target); break;
            }
        }
    }
}

// The loop of the full tile in assembly with its registers named: from intrinsics, and from asm statements bound
// to variables, gcc spills or copies the twelve accumulators (measured 128 against 197 GMAC/s).
#define STEP_ROW(address, low, high)                         \
    "vpbroadcastd " address ", %%ymm14\n\t"                  \
    "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n\t"               \
    "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"               \
    "vpaddw %%ymm15, %%ymm" low ", %%ymm" low "\n\t"         \
    "vpaddw %%ymm14, %%ymm" high ", %%ymm" high "\n\t"

#define STEP(w_offset, x_offset)                             \
    "vmovdqa " w_offset "(%[w]), %%ymm12\n\t"                \
    "vmovdqa 32+" w_offset "(%[w]), %%ymm13\n\t"             \
    STEP_ROW(x_offset "(%[x])", "0", "1")                    \
    STEP_ROW(x_offset "(%[x], %[stride])", "2", "3")         \
    STEP_ROW(x_offset "(%[x], %[stride], 2)", "4", "5")      \
    STEP_ROW(x_offset "(%[x3])", "6", "7")                   \
    STEP_ROW(x_offset "(%[x3], %[stride])", "8", "9")        \
    STEP_ROW(x_offset "(%[x3], %[stride], 2)", "10", "11")

#define START(address, low, high) "vpbroadcastd " address ", %%ymm" low "\n\tvmovdqa %%ymm" low ", %%ymm" high "\n\t"

// Pair sums to int32, onto the int32 output.
#define FINISH(sums, offset)                                 \
    "vpmaddwd %%ymm14, %%ymm" sums ", %%ymm" sums "\n\t"     \
    "vpaddd " offset "(%[c]), %%ymm" sums ", %%ymm" sums "\n\t" \
    "vmovdqu %%ymm" sums ", " offset "(%[c])\n\t"

// Pair sums to float, times the group's scale (ymm12, ymm13), onto the float output.
#define FINISH_SCALED(sums, scale, offset)                   \
    "vpmaddwd %%ymm14, %%ymm" sums ", %%ymm" sums "\n\t"     \
    "vcvtdq2ps %%ymm" sums ", %%ymm" sums "\n\t"             \
    "vfmadd213ps " offset "(%[c]), %%ymm" scale ", %%ymm" sums "\n\t" \
    "vmovups %%ymm" sums ", " offset "(%[c])\n\t"

#define ONES "vpcmpeqw %%ymm14, %%ymm14, %%ymm14\n\tvpsrlw $15, %%ymm14, %%ymm14\n\t"

#define FULL_TILE_RUN(finish)                                                                                 \
    __asm__ volatile(                                                                                         \
        START("(%[r])", "0", "1") START("(%[r], %[r_stride])", "2", "3")                                      \
        START("(%[r], %[r_stride], 2)", "4", "5") START("(%[r3])", "6", "7")                                  \
        START("(%[r3], %[r_stride])", "8", "9") START("(%[r3], %[r_stride], 2)", "10", "11")                  \
        "test $1, %[steps]\n\t"                                                                               \
        "jz 1f\n\t"                                                                                           \
        STEP("0", "0")                                                                                        \
        "add $64, %[w]\n\t"                                                                                   \
        "add $4, %[x]\n\t"                                                                                    \
        "add $4, %[x3]\n\t"                                                                                   \
        "1:\n\t"                                                                                              \
        "shr $1, %[steps]\n\t"                                                                                \
        "jz 3f\n\t"                                                                                           \
        ".p2align 4\n\t"                                                                                      \
        "2:\n\t"                                                                                              \
        STEP("0", "0") STEP("64", "4")                                                                        \
        "add $128, %[w]\n\t"                                                                                  \
        "add $8, %[x]\n\t"                                                                                    \
        "add $8, %[x3]\n\t"                                                                                   \
        "dec %[steps]\n\t"                                                                                    \
        "jnz 2b\n\t"                                                                                          \
        "3:\n\t"                                                                                              \
        ONES finish                                                                                           \
        : [w] "+r"(w), [x] "+r"(x), [x3] "+r"(x3), [steps] "+r"(steps)                                        \
        : [stride] "r"(t->x_stride), [r] "r"(r), [r3] "r"(r + 3 * t->correction_stride),                      \
          [r_stride] "r"(4 * t->correction_stride), [c] "r"(t->c), [scale] "r"(scale)                         \
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",     \
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

// One run of 6 rows x 16 columns.
AVX2 static void full_run(const dt_tile *t, const dt_run *run, const int32_t *r, const float *scale) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x = dt_run_x(t, run);
    const int8_t *x3 = x + 3 * t->x_stride;
    ptrdiff_t steps = run->steps;
    if (scale) {
        FULL_TILE_RUN("vmovups (%[scale]), %%ymm12\n\tvmovups 32(%[scale]), %%ymm13\n\t"
                      FINISH_SCALED("0", "12", "0") FINISH_SCALED("1", "13", "32") FINISH_SCALED("2", "12", "64")
                      FINISH_SCALED("3", "13", "96") FINISH_SCALED("4", "12", "128") FINISH_SCALED("5", "13", "160")
                      FINISH_SCALED("6", "12", "192") FINISH_SCALED("7", "13", "224") FINISH_SCALED("8", "12", "256")
                      FINISH_SCALED("9", "13", "288") FINISH_SCALED("10", "12", "320")
                      FINISH_SCALED("11", "13", "352"));
    } else {
        FULL_TILE_RUN(FINISH("0", "0") FINISH("1", "32") FINISH("2", "64") FINISH("3", "96") FINISH("4", "128")
                      FINISH("5", "160") FINISH("6", "192") FINISH("7", "224") FINISH("8", "256") FINISH("9", "288")
                      FINISH("10", "320") FINISH("11", "352"));
    }
}

AVX2 INLINE void finish(__m256i pairs, const float *scale, void *c) {
    const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    if (scale) {
        _mm256_storeu_ps(c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scale), _mm256_loadu_ps(c)));
    } else {
        _mm256_storeu_si256(c, _mm256_add_epi32(sum, _mm256_loadu_si256(c)));
    }
}

// The same for the last rows, fewer than six.
AVX2 INLINE void short_run(const dt_tile *t, const dt_run *run, const int32_t *r, const float *scale, const int rows) {
    const uint8_t *w = dt_run_panel(t, run, TILE_COLUMNS);
    const int8_t *x = dt_run_x(t, run);
    __m256i low[4], high[4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) low[m] = high[m] = _mm256_set1_epi32(r[m * t->correction_stride]);
    for (int32_t s = 0; s < run->steps; s++) {
        const __m256i w0 = _mm256_load_si256((const __m256i *)(w + 64 * s));
        const __m256i w1 = _mm256_load_si256((const __m256i *)(w + 64 * s + 32));
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            int32_t four;
            memcpy(&four, x + m * t->x_stride + 4 * s, 4);
            const __m256i q = _mm256_set1_epi32(four);
            low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(w0, q));
            high[m] = _mm256_add_epi16(high[m], _mm256_maddubs_epi16(w1, q));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        float *c = (float *)t->c + m * TILE_COLUMNS;
        finish(low[m], scale, c);
        finish(high[m], scale ? scale + 8 : NULL, c + 8);
    }
}

AVX2 static void tile(const dt_tile *t, int32_t rows) {
    for (int32_t i = 0; i < t->run_count; i++) {
        const dt_run *run = &t->runs[i];
        const int32_t *r = t->correction + i;
        const float *scale = dt_run_scale(t, run, TILE_COLUMNS);
        if (rows == TILE_ROWS) {
            full_run(t, run, r, scale);
        } else if (rows == 4) {
            short_run(t, run, r, scale, 4);
        } else {
            short_run(t, run, r, scale, 2);
        }
    }
}

AVX2 INLINE int32_t total(__m256i lanes) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

AVX2 INLINE float total_float(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// One run of `columns` weight rows times `rows` rows of x: int16 pair sums, from zero.
AVX2 INLINE void gemv_run(const uint8_t *const w[GEMV_COLUMNS], const int8_t *x, ptrdiff_t x_stride, const dt_run *run,
                          const int shift, const int columns, const int rows, __m256i *pairs) {
    __m256i sums[GEMV_COLUMNS * GEMV_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) sums[i] = _mm256_setzero_si256();
    for (ptrdiff_t k = 0; k < 4 * run->steps; k += 32) {
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            const __m256i u = codes(_mm256_loadu_si256((const __m256i *)(w[n] + run->byte + k)), shift);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const __m256i q = _mm256_loadu_si256((const __m256i *)(x + m * x_stride + k));
                sums[n * rows + m] = _mm256_add_epi16(sums[n * rows + m], _mm256_maddubs_epi16(u, q));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) pairs[i] = sums[i];
}

// Outputs [row, row + rows) x [column, column + columns), the runs one after the other.
AVX2 INLINE void gemv_runs(const dt_gemv *g, int32_t row, int32_t column, const int rows, const int columns,
                           const int scaled) {
    const uint8_t *w[GEMV_COLUMNS];
    __m256i sums[GEMV_COLUMNS * GEMV_ROWS];
    __m256 values[GEMV_COLUMNS * GEMV_ROWS];
#pragma GCC unroll 4
    for (int n = 0; n < columns; n++) w[n] = g->weight + (column + n) * g->plane_bytes;
    // only one row at a time is ever so close to the end that it is read from a copy
    if (columns == 1) w[0] = dt_readable(w[0], g->weight_end, (size_t)g->plane_bytes + 64, g->row_copy);
#pragma GCC unroll 16
    for (int i = 0; i < columns * rows; i++) {
        sums[i] = _mm256_setzero_si256();
        values[i] = _mm256_setzero_ps();
    }
    for (int32_t i = 0; i < g->run_count; i++) {
        const dt_run *run = &g->runs[i];
        const int8_t *x = g->x + row * g->x_stride + 4 * (ptrdiff_t)run->step;
        __m256i pairs[GEMV_COLUMNS * GEMV_ROWS];
        switch (run->shift) {
            case 0: gemv_run(w, x, g->x_stride, run, 0, columns, rows, pairs); break;
            case 2: gemv_run(w, x, g->x_stride, run, 2, columns, rows, pairs); break;
            case 4: gemv_run(w, x, g->x_stride, run, 4, columns, rows, pairs); break;
            default: gemv_run(w, x, g->x_stride, run, 6, columns, rows, pairs); break;
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            // the surplus joins one lane, so every lane stays an exact integer
            const __m256i surplus =
                _mm256_zextsi128_si256(_mm_cvtsi32_si128(g->correction[(row + m) * g->correction_stride + i]));
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) {
                const int at = n * rows + m;
                const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(pairs[at], _mm256_set1_epi16(1)), surplus);
                if (scaled) {
                    const __m256 scale = _mm256_broadcast_ss(g->group_scale + (column + n) * g->groups + run->group);
                    values[at] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, values[at]);
                } else {
                    sums[at] = _mm256_add_epi32(sums[at], sum);
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
                ((float *)g->c)[at] = total_float(values[n * rows + m]);
            } else {
                ((int32_t *)g->c)[at] = total(sums[n * rows + m]);
            }
        }
    }
}

// All planes of a byte at once, for rows of one scale: a nibble holds two codes, and two table look-ups per nibble
// replace the shift, add and mask of each plane.
AVX2 INLINE void gemv_planes(const dt_gemv *g, int32_t row, int32_t column, const int columns) {
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    const __m256i low_code = _mm256_setr_epi8(1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0,  //
                                              1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0);
    const __m256i high_code = _mm256_setr_epi8(1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0,  //
                                               1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0);
    const ptrdiff_t bytes = 4 * (ptrdiff_t)g->runs[0].steps;
    const int8_t *x = g->x + row * g->x_stride;
    const uint8_t *w[GEMV_COLUMNS];
    __m256i sums[GEMV_COLUMNS];
#pragma GCC unroll 4
    for (int n = 0; n < columns; n++) {
        w[n] = g->weight + (column + n) * g->plane_bytes;
        sums[n] = _mm256_setzero_si256();
    }
    if (columns == 1) w[0] = dt_readable(w[0], g->weight_end, (size_t)g->plane_bytes + 64, g->row_copy);
    for (ptrdiff_t start = 0; start < bytes; start += 16 * 32) {  // 4 planes x 16 vectors x 508 fit int16
        const ptrdiff_t end = start + 16 * 32 < bytes ? start + 16 * 32 : bytes;
        __m256i pairs[GEMV_COLUMNS];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) pairs[n] = _mm256_setzero_si256();
        for (ptrdiff_t k = start; k < end; k += 32) {
            const __m256i x0 = _mm256_loadu_si256((const __m256i *)(x + k));
            const __m256i x1 = _mm256_loadu_si256((const __m256i *)(x + bytes + k));
            const __m256i x2 = _mm256_loadu_si256((const __m256i *)(x + 2 * bytes + k));
            const __m256i x3 = _mm256_loadu_si256((const __m256i *)(x + 3 * bytes + k));
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) {
                const __m256i packed = _mm256_loadu_si256((const __m256i *)(w[n] + k));
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
                const __m256i low = _mm256_and_si256(packed, nibble);
                const __m256i p0 = _mm256_maddubs_epi16(_mm256_shuffle_epi8(high_code, high), x0);
                const __m256i p1 = _mm256_maddubs_epi16(_mm256_shuffle_epi8(low_code, high), x1);
                const __m256i p2 = _mm256_maddubs_epi16(_mm256_shuffle_epi8(high_code, low), x2);
                const __m256i p3 = _mm256_maddubs_epi16(_mm256_shuffle_epi8(low_code, low), x3);
                const __m256i four = _mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3));
                pairs[n] = _mm256_add_epi16(pairs[n], four);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            sums[n] = _mm256_add_epi32(sums[n], _mm256_madd_epi16(pairs[n], _mm256_set1_epi16(1)));
        }
    }
    const int32_t *surplus = g->correction + row * g->correction_stride;
    const int32_t correction = surplus[0] + surplus[1] + surplus[2] + surplus[3];
#pragma GCC unroll 4
    for (int n = 0; n < columns; n++) {
        ((int32_t *)g->c)[(ptrdiff_t)row * g->tile_columns + column + n] = total(sums[n]) + correction;
    }
}

AVX2 INLINE void gemv_columns(const dt_gemv *g, int32_t column, const int columns) {
    // the four planes in step: K is a multiple of 4 and no run is split
    const int planes = !g->group_scale && g->run_count == 4 && g->runs[0].steps == g->runs[3].steps;
    int32_t row = 0;
    while (row < g->rows) {
        const int32_t left = g->rows - row;
        if (left == 1 && planes) {
            gemv_planes(g, row, column, columns);
            row += 1;
        } else if (left == 1) {
            if (g->group_scale) gemv_runs(g, row, column, 1, columns, 1);
            else gemv_runs(g, row, column, 1, columns, 0);
            row += 1;
        } else if (left < 4) {
            if (g->group_scale) gemv_runs(g, row, column, 2, columns, 1);
            else gemv_runs(g, row, column, 2, columns, 0);
            row += 2;
        } else {
            if (g->group_scale) gemv_runs(g, row, column, 4, columns, 1);
            else gemv_runs(g, row, column, 4, columns, 0);
            row += 4;
        }
    }
}

AVX2 void dt_gemv_avx2(const dt_gemv *g) {
    const int wide = g->rows == 1 ? 4 : 2;
    int32_t n = 0;
    while (n < g->columns) {
        const uint8_t *end = g->weight + (n + wide) * g->plane_bytes + 64;
        if (n + wide > g->columns || end > g->weight_end) {
            gemv_columns(g, n, 1);
            n += 1;
        } else if (wide == 4) {
            gemv_columns(g, n, 4);
            n += 4;
        } else {
            gemv_columns(g, n, 2);
            n += 2;
        }
    }
}

AVX2 void dt_scales_avx2(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out) {
    if (!multiplier) {
        int64_t i = 0;
        for (; i + 8 <= rows * groups; i += 8) _mm256_storeu_ps(out + i, load8(scale, dtype, i));
        for (; i < rows * groups; i++) out[i] = dt_load(scale, dtype, i);
        return;
    }
    for (int64_t n = 0; n < rows; n++) {
        const float row_scale = dt_load(scale, dtype, n);
        for (int64_t g = 0; g < groups; g++) out[n * groups + g] = row_scale * (float)multiplier[n * groups + g] / 63.0f;
    }
}

AVX2 void dt_expand_avx2(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out) {
    const __m256 factor = _mm256_set1_ps(scale);
    const __m128i up = _mm_cvtsi32_si128(30 - shift);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + i)));
        const __m256i code = _mm256_srai_epi32(_mm256_sll_epi32(eight, up), 30);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(code), factor));
    }
    dt_expand_scalar(bytes + i, n - i, shift, scale, out + i);
}

AVX2 INLINE __m128i to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    const __m256i high = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

AVX2 void dt_store_avx2(const void *c, const float *column_scale, float row_scale, const float *bias, void *out,
                        int64_t dtype, int32_t columns) {
    const __m256 factor = _mm256_set1_ps(row_scale);
    int32_t n = 0;
    for (; n + 8 <= columns; n += 8) {
        __m256 value;
        if (column_scale) {
            const __m256i sum = _mm256_loadu_si256((const __m256i *)((const int32_t *)c + n));
            value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(column_scale + n));
        } else {
            value = _mm256_loadu_ps((const float *)c + n);
        }
        value = _mm256_fmadd_ps(value, factor, bias ? _mm256_loadu_ps(bias + n) : _mm256_setzero_ps());
        if (dtype == DT_FLOAT32) {
            _mm256_storeu_ps((float *)out + n, value);
        } else {
            const __m128i half = dtype == DT_FLOAT16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(value);
            _mm_storeu_si128((__m128i *)((uint16_t *)out + n), half);
        }
    }
    if (n < columns) {
        char *rest = (char *)out + n * (dtype == DT_FLOAT32 ? 4 : 2);
        dt_store_scalar((const float *)c + n, column_scale ? column_scale + n : NULL, row_scale, bias ? bias + n : NULL,
                        rest, dtype, columns - n);
    }
}

static int supported(void) { return dt_x86_has(DT_X86_AVX2); }

const dt_variant dt_avx2 = {
    .name = "avx2",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 2,
    .tile_columns = TILE_COLUMNS,
    .run_steps = RUN_STEPS,
    .block_steps = 256,
    .gemv_align = 32,
    .gemv_run_steps = 512,  // 64 vectors of 32 columns
    .gemv_max_rows = 8,
    .absmax = dt_absmax_avx2,
    .quantize = dt_quantize_avx2,
    .sum = dt_sum_avx2,
    .correction = correction,
    .decode = dt_decode_avx2,
    .tile = tile,
    .gemv = dt_gemv_avx2,
    .scales = dt_scales_avx2,
    .expand = dt_expand_avx2,
    .store = dt_store_avx2,
};
#endif
