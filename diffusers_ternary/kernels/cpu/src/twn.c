// SPDX-License-Identifier: Apache-2.0
// Ternary weight networks (Li et al., arXiv 1605.04711): threshold 0.75 E|w|, least-squares scale, packed as planes.
// Sums are taken in double, so that they do not depend on the width of the vectors.
#include <stdlib.h>
#include <string.h>

#include "convert.h"
#include "ternary.h"

enum { DT_ERROR_VALUE = -3 };  // NaN or an infinity

typedef struct {
    const char *weight;
    int64_t dtype, stride, rows, columns, group_size;
    uint8_t *planes;  // [rows][ceil(columns / 4)]
    float *scales;    // [rows][groups]
    int64_t parts;
    int64_t results[256];
} dt_twn_call;

#define INLINE static inline __attribute__((always_inline))

INLINE float threshold(double sum, int64_t n) { return 0.75f * (float)sum / (float)n; }

#ifdef DT_X86
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))

AVX2 INLINE __m256 load8(const char *w, const int64_t dtype, int64_t i) {
    if (dtype == DT_FLOAT32) return _mm256_loadu_ps((const float *)w + i);
    const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)w + i));
    if (dtype == DT_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 INLINE __m256d add8(__m256d sum, __m256 v) {
    return _mm256_add_pd(sum, _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                            _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
}

AVX2 INLINE double total(__m256d v) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

// Codes (two bits in a byte each) and scale of one group.
AVX2 INLINE float group_avx2(const char *w, const int64_t dtype, int64_t n, uint8_t *codes) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256d a = _mm256_setzero_pd(), b = a;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        a = add8(a, _mm256_and_ps(load8(w, dtype, i), magnitude));
        b = add8(b, _mm256_and_ps(load8(w, dtype, i + 8), magnitude));
    }
    double sum = total(_mm256_add_pd(a, b));
    for (int64_t k = i; k < n; k++) sum += (double)dt_float(dt_bits(dt_load(w, dtype, k)) & 0x7fffffffu);
    if (!(sum <= 1e300)) return -1.0f;
    const float delta = threshold(sum, n);
    const __m256 high = _mm256_set1_ps(delta);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t kept = 0;
    a = b = _mm256_setzero_pd();
    for (i = 0; i + 32 <= n; i += 32) {
        __m256i code[4];
        uint32_t set[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const __m256 v = load8(w, dtype, i + 8 * k), size = _mm256_and_ps(v, magnitude);
            const __m256 mask = _mm256_cmp_ps(size, high, _CMP_GT_OQ);
            if (k & 1) a = add8(a, _mm256_and_ps(size, mask));
            else b = add8(b, _mm256_and_ps(size, mask));
            set[k] = (uint32_t)_mm256_movemask_ps(mask);
            // 1, or 3 below zero: the sign moves to bit 1
            const __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(v), 31);
            const __m256i both = _mm256_or_si256(_mm256_set1_epi32(1), _mm256_add_epi32(sign, sign));
            code[k] = _mm256_and_si256(_mm256_castps_si256(mask), both);
        }
        kept += __builtin_popcount(set[0] | set[1] << 8 | set[2] << 16 | set[3] << 24);
        const __m256i packed =
            _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
        _mm256_storeu_si256((__m256i *)(codes + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    sum = total(_mm256_add_pd(a, b));
    for (; i < n; i++) {
        const float v = dt_load(w, dtype, i), size = dt_float(dt_bits(v) & 0x7fffffffu);
        const int set = size > delta;
        codes[i] = (uint8_t)(set ? (v < 0.0f ? 3 : 1) : 0);
        sum += set ? (double)size : 0.0;
        kept += set;
    }
    return kept ? (float)sum / (float)kept : 0.0f;
}

AVX2 static void join_avx2(const uint8_t *codes, int64_t width, uint8_t *restrict out) {
    for (int64_t c = 0; c < width; c++)
        out[c] = (uint8_t)(codes[c] << 6 | codes[c + width] << 4 | codes[c + 2 * width] << 2 | codes[c + 3 * width]);
}

AVX2 static int64_t row_avx2(const dt_twn_call *call, const char *w, uint8_t *codes, float *scales, uint8_t *out) {
    const int64_t bytes = call->dtype == DT_FLOAT32 ? 4 : 2;
    for (int64_t k = 0; k < call->columns; k += call->group_size, scales++) {
        const int64_t n = call->columns - k < call->group_size ? call->columns - k : call->group_size;
        const char *group = w + k * bytes;
        if (call->dtype == DT_FLOAT32) *scales = group_avx2(group, DT_FLOAT32, n, codes + k);
        else if (call->dtype == DT_BFLOAT16) *scales = group_avx2(group, DT_BFLOAT16, n, codes + k);
        else *scales = group_avx2(group, DT_FLOAT16, n, codes + k);
        if (*scales < 0.0f) return DT_ERROR_VALUE;
    }
    join_avx2(codes, (call->columns + 3) / 4, out);
    return 0;
}
#endif

static int64_t row_scalar(const dt_twn_call *call, const char *w, uint8_t *codes, float *scales, uint8_t *out) {
    const int64_t bytes = call->dtype == DT_FLOAT32 ? 4 : 2, width = (call->columns + 3) / 4;
    for (int64_t k = 0; k < call->columns; k += call->group_size, scales++) {
        const int64_t n = call->columns - k < call->group_size ? call->columns - k : call->group_size;
        const char *group = w + k * bytes;
        double sum = 0.0, kept_sum = 0.0;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) sum += (double)dt_float(dt_bits(dt_load(group, call->dtype, i)) & 0x7fffffffu);
        if (!(sum <= 1e300)) return DT_ERROR_VALUE;
        const float delta = threshold(sum, n);
        for (int64_t i = 0; i < n; i++) {
            const float v = dt_load(group, call->dtype, i), size = dt_float(dt_bits(v) & 0x7fffffffu);
            const int set = size > delta;
            codes[k + i] = (uint8_t)(set ? (v < 0.0f ? 3 : 1) : 0);
            kept_sum += set ? (double)size : 0.0;
            kept += set;
        }
        *scales = kept ? (float)kept_sum / (float)kept : 0.0f;
    }
    for (int64_t c = 0; c < width; c++)
        out[c] = (uint8_t)(codes[c] << 6 | codes[c + width] << 4 | codes[c + 2 * width] << 2 | codes[c + 3 * width]);
    return 0;
}

static void twn_part(void *context, int64_t part) {
    dt_twn_call *call = context;
    const int64_t width = (call->columns + 3) / 4, groups = (call->columns + call->group_size - 1) / call->group_size;
    int64_t (*row)(const dt_twn_call *, const char *, uint8_t *, float *, uint8_t *) = row_scalar;
#ifdef DT_X86
    if (dt_avx2.supported()) row = row_avx2;
#endif
    uint8_t *codes = calloc(1, (size_t)(4 * width));  // columns past the end stay 0
    int64_t result = codes ? 0 : DT_ERROR_MEMORY;
    const int64_t last = call->rows * (part + 1) / call->parts;
    for (int64_t n = call->rows * part / call->parts; !result && n < last; n++) {
        const char *w = call->weight + n * call->stride * (call->dtype == DT_FLOAT32 ? 4 : 2);
        result = row(call, w, codes, call->scales + n * groups, call->planes + n * width);
    }
    free(codes);
    call->results[part] = result;
}

// A float weight [rows][columns], `stride` elements between rows, by `workers` threads; DT_ERROR_VALUE if it holds NaN or
// an infinity.
DT_EXPORT int64_t dt_twn(const void *weight, int64_t dtype, int64_t stride, int64_t rows, int64_t columns,
                         int64_t group_size, uint8_t *planes, float *scales, int64_t workers) {
    dt_twn_call call = {weight, dtype, stride, rows, columns, group_size, planes, scales, workers, {0}};
    if (call.parts > rows) call.parts = rows;
    if (call.parts > 256) call.parts = 256;
    if (call.parts < 1) call.parts = 1;
    dt_parallel(twn_part, &call, call.parts);
    for (int64_t i = 0; i < call.parts; i++) {
        if (call.results[i]) return call.results[i];
    }
    return 0;
}
