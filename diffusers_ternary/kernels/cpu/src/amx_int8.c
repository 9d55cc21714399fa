// SPDX-License-Identifier: Apache-2.0
// AMX: tdpbssd multiplies tiles of 16 rows x 64 columns of int8; 32 rows x 32 columns of output in four tiles.
// Codes are decoded as signed bytes, so there is no surplus to take off. A multiplier of 1 to 63 fits the byte as well:
// with multipliers the sums stay integers over the whole of K.
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE  // syscall
#endif
#include "ternary.h"

#ifdef DT_AMX
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "convert.h"

#define INLINE static inline __attribute__((always_inline))
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,gfni,avx2,fma,f16c,amx-tile,amx-int8")))

enum { TILE = 16, ROWS = 32, COLUMNS = 32, TILE_BYTES = 1024, STEP_BYTES = 4 * COLUMNS, TILE_STEPS = 16 };

// Of vgf2p8affineqb: byte i of the matrix gives bit 7 - i of the result. The code of plane j is in bits 7-2j and 6-2j:
// bit 0 of the result is its low bit, all others its sign.
#define CODE_MATRIX(j) ((int64_t)(0x0101010101010101ull * (0x80u >> (2 * (j))) & 0x00ffffffffffffffull) | (int64_t)((uint64_t)(0x40u >> (2 * (j))) << 56))
// All bits of the result are the low bit of the code (it is set if the code is not 0), or its sign.
#define LOW_MATRIX(j) ((int64_t)(0x0101010101010101ull * (0x40u >> (2 * (j)))))
#define SIGN_MATRIX(j) ((int64_t)(0x0101010101010101ull * (0x80u >> (2 * (j)))))

// 16 rows x 64 bytes to 16 vectors of [16 rows][4 bytes].
AMX INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4a + b] holds, in its 128-bit lane l, dword 4l + b of rows 4a .. 4a + 3
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const __m512i low = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88), high = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
        t[b] = _mm512_shuffle_i32x4(low, low2, 0x88);
        t[8 + b] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        t[4 + b] = _mm512_shuffle_i32x4(high, high2, 0x88);
        t[12 + b] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// `steps` lines of one plane; the multiplier of a line is that of its step's group.
AMX INLINE void store_plane(const __m512i lines[16], int32_t steps, const int plane, const int32_t *groups,
                            const uint8_t *multipliers, uint8_t *target) {
    const __m512i code = _mm512_set1_epi64(CODE_MATRIX(plane));
    const __m512i low = _mm512_set1_epi64(LOW_MATRIX(plane)), sign = _mm512_set1_epi64(SIGN_MATRIX(plane));
#pragma GCC unroll 16
    for (int32_t i = 0; i < 16; i++) {
        if (i >= steps) break;
        __m512i value;
        if (multipliers) {
            const __m512i m = _mm512_load_si512(multipliers + (ptrdiff_t)groups[i] * STEP_BYTES);
            const __m512i negative = _mm512_gf2p8affine_epi64_epi8(lines[i], sign, 0);
            const __m512i set = _mm512_gf2p8affine_epi64_epi8(lines[i], low, 0);
            value = _mm512_sub_epi8(_mm512_ternarylogic_epi64(set, m, negative, 0x6a), negative);  // (set & m) ^ negative
        } else {
            value = _mm512_gf2p8affine_epi64_epi8(lines[i], code, 0);
        }
        _mm512_store_si512(target + (ptrdiff_t)i * STEP_BYTES, value);
    }
}

// Where no segment is padded a step is four columns: one transpose serves all four planes.
AMX INLINE void decode_natural(const dt_panel *p, const int multiplied) {
    const int64_t width = p->plan->plane_bytes;
    const ptrdiff_t plane_steps = width / 4;
    for (int half = 0; half < 2; half++) {
        const uint8_t *rows[16];
        for (int32_t k = 0; k < 16; k++) {
            const int32_t row = 16 * half + k;
            rows[k] = p->weight + (row < p->columns ? row : p->columns - 1) * width;
        }
        for (int64_t byte = 0; byte < width; byte += 64) {
            const int64_t left = width - byte < 64 ? width - byte : 64;
            const __mmask64 mask = ~0ull >> (64 - left);
            __m512i lines[16];
#pragma GCC unroll 16
            for (int k = 0; k < 16; k++) lines[k] = _mm512_maskz_loadu_epi8(mask, rows[k] + byte);
            transpose(lines);
            const ptrdiff_t step = byte / 4;
            uint8_t *target = p->panel + step * STEP_BYTES + 64 * half;
            const int32_t *groups = multiplied ? p->step_groups + step : NULL;
            const uint8_t *multipliers = multiplied ? p->multipliers + 64 * half : NULL;
            const int32_t steps = (int32_t)left / 4;
            store_plane(lines, steps, 0, groups, multipliers, target);
            groups += multiplied ? plane_steps : 0;
            store_plane(lines, steps, 1, groups, multipliers, target + plane_steps * STEP_BYTES);
            groups += multiplied ? plane_steps : 0;
            store_plane(lines, steps, 2, groups, multipliers, target + 2 * plane_steps * STEP_BYTES);
            groups += multiplied ? plane_steps : 0;
            store_plane(lines, steps, 3, groups, multipliers, target + 3 * plane_steps * STEP_BYTES);
        }
    }
}

// Any plan: the segments are decoded one by one, as for the other variants, and made signed afterward.
AMX static void decode_padded(const dt_panel *p) {
    dt_decode_avx2(p->plan, 0, p->plan->steps, p->weight, p->weight_end, p->columns, COLUMNS, p->panel);
    for (int32_t s = 0; s < p->plan->steps; s++) {
        for (int half = 0; half < 2; half++) {
            uint8_t *line = p->panel + (ptrdiff_t)s * STEP_BYTES + 64 * half;
            const __m512i code = _mm512_sub_epi8(_mm512_load_si512(line), _mm512_set1_epi8(1));
            __m512i value = code;
            if (p->multipliers) {
                const __m512i m = _mm512_load_si512(p->multipliers + (ptrdiff_t)p->step_groups[s] * STEP_BYTES + 64 * half);
                value = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(code, code), m);
                value = _mm512_mask_sub_epi8(value, _mm512_movepi8_mask(code), _mm512_setzero_si512(), m);
            }
            _mm512_store_si512(line, value);
        }
    }
}

#define MULTIPLY(b, a, c) "tdpbssd %%tmm" b ", %%tmm" a ", %%tmm" c "\n\t"

// x is read once for a panel: the hint t1 keeps it from driving a panel of up to 40 KB out of the first cache (3,200 to
// 4,300 GOP/s at K = 1152).
#define STEP_32_ROWS                                                                       \
    "tileloadd (%[w], %[w_stride]), %%tmm6\n\t"                                            \
    "tileloaddt1 (%[x0], %[x_stride]), %%tmm4\n\t" MULTIPLY("6", "4", "0")                 \
    "tileloadd 64(%[w], %[w_stride]), %%tmm7\n\t" MULTIPLY("7", "4", "1")                  \
    "tileloaddt1 (%[x1], %[x_stride]), %%tmm5\n\t" MULTIPLY("6", "5", "2") MULTIPLY("7", "5", "3") \
    "add $1024, %[x0]\n\t"                                                                 \
    "add $1024, %[x1]\n\t"                                                                 \
    "add $2048, %[w]\n\t"

// What is not in the cache yet is fetched one or two lines a step, and no nearer than the second cache. All at once, or
// into the first (prefetchw), they would keep the buffers between the two for as long as the slowest memory needs, and
// the tiles wait for those.
typedef struct {
    const char *out;          // lines that will be written, `out_stride` bytes apart
    ptrdiff_t out_stride;
    const uint8_t *weight;    // consecutive lines of the next panel
} dt_ahead;

// Sums of `tiles` tiles of K onto zero, stored as int32 [32][32]. In assembly: gcc 12's intrinsics do not tell the
// compiler which memory they touch.
AMX INLINE void sum_32_rows(const int8_t *x0, const int8_t *x1, const uint8_t *w, ptrdiff_t tiles, int32_t *sums,
                            dt_ahead ahead) {
    ptrdiff_t first = tiles < 16 ? tiles : 16;
    tiles -= first;
    __asm__ volatile(
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
        ".p2align 4\n\t"
        "1:\n\t"
        "prefetcht1 (%[out])\n\t"
        "prefetcht1 (%[out], %[out_stride])\n\t"
        "lea (%[out], %[out_stride], 2), %[out]\n\t"
        "prefetcht1 (%[ahead])\n\t"
        "add $64, %[ahead]\n\t" STEP_32_ROWS
        "dec %[first]\n\t"
        "jnz 1b\n\t"
        "test %[tiles], %[tiles]\n\t"
        "jz 3f\n\t"
        ".p2align 4\n\t"
        "2:\n\t"
        "prefetcht1 (%[ahead])\n\t"
        "add $64, %[ahead]\n\t" STEP_32_ROWS
        "dec %[tiles]\n\t"
        "jnz 2b\n\t"
        "3:\n\t"
        "tilestored %%tmm0, (%[sums], %[w_stride])\n\t"
        "tilestored %%tmm1, 64(%[sums], %[w_stride])\n\t"
        "tilestored %%tmm2, 2048(%[sums], %[w_stride])\n\t"
        "tilestored %%tmm3, 2112(%[sums], %[w_stride])\n\t"
        : [x0] "+r"(x0), [x1] "+r"(x1), [w] "+r"(w), [tiles] "+r"(tiles), [first] "+r"(first), [out] "+r"(ahead.out),
          [ahead] "+r"(ahead.weight)
        : [w_stride] "r"((ptrdiff_t)STEP_BYTES), [x_stride] "r"((ptrdiff_t)64), [sums] "r"(sums),
          [out_stride] "r"(ahead.out_stride)
        : "cc", "memory");
}

AMX INLINE void sum_16_rows(const int8_t *x, const uint8_t *w, ptrdiff_t tiles, int32_t *sums) {
    __asm__ volatile(
        "tilezero %%tmm0\n\ttilezero %%tmm1\n\t"
        ".p2align 4\n\t"
        "1:\n\t"
        "tileloaddt1 (%[x], %[x_stride]), %%tmm4\n\t"
        "tileloadd (%[w], %[w_stride]), %%tmm6\n\t" MULTIPLY("6", "4", "0")
        "tileloadd 64(%[w], %[w_stride]), %%tmm7\n\t" MULTIPLY("7", "4", "1")
        "add $1024, %[x]\n\t"
        "add $2048, %[w]\n\t"
        "dec %[tiles]\n\t"
        "jnz 1b\n\t"
        "tilestored %%tmm0, (%[sums], %[w_stride])\n\t"
        "tilestored %%tmm1, 64(%[sums], %[w_stride])\n\t"
        : [x] "+r"(x), [w] "+r"(w), [tiles] "+r"(tiles)
        : [w_stride] "r"((ptrdiff_t)STEP_BYTES), [x_stride] "r"((ptrdiff_t)64), [sums] "r"(sums)
        : "cc", "memory");
}

// 16 or 32 rows x 32 columns over `steps` steps from `step` on.
AMX INLINE void sum_rows(const dt_panel *p, int64_t row, int rows, int32_t step, int32_t steps, int32_t *sums) {
    const ptrdiff_t out_bytes = p->out_stride * (p->dtype == DT_FLOAT32 ? 4 : 2);
    const int64_t blocks = (p->rows + ROWS - 1) / ROWS, bytes = COLUMNS * p->plan->plane_bytes;
    const ptrdiff_t first = 2 * (step / TILE_STEPS) < ROWS ? 2 * (step / TILE_STEPS) : 0;  // two lines a tile
    const dt_ahead ahead = {(const char *)p->out + (row + first) * out_bytes, step && !first ? 0 : out_bytes,
                            p->weight + bytes + row / ROWS * bytes / blocks + 4 * (ptrdiff_t)step};
    const ptrdiff_t tile = step / TILE_STEPS, tiles = (steps + TILE_STEPS - 1) / TILE_STEPS;
    const int8_t *x = p->x + (row / TILE * p->row_tiles + tile) * TILE_BYTES;
    const uint8_t *w = p->panel + (ptrdiff_t)step * STEP_BYTES;
    if (rows > TILE) sum_32_rows(x, x + p->row_tiles * TILE_BYTES, w, tiles, sums, ahead);
    else sum_16_rows(x, w, tiles, sums);
}

// float [rows][32] += int32 [rows][32] * scale[32], or = for the first group
AMX INLINE void accumulate(const int32_t *sums, const float *scale, int rows, int first, float *values) {
    const __m512 low = _mm512_loadu_ps(scale), high = _mm512_loadu_ps(scale + 16);
    for (int m = 0; m < rows; m++, sums += COLUMNS, values += COLUMNS) {
        const __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(sums)), b = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16));
        _mm512_store_ps(values, first ? _mm512_mul_ps(a, low) : _mm512_fmadd_ps(a, low, _mm512_load_ps(values)));
        _mm512_store_ps(values + 16, first ? _mm512_mul_ps(b, high) : _mm512_fmadd_ps(b, high, _mm512_load_ps(values + 16)));
    }
}

// Whole rows of 32 columns; `scaled` as in dt_store_scalar. bfloat16 results below 2^-126 become 0, as oneDNN's do.
AMX INLINE void store_rows(const dt_panel *p, int64_t row, int rows, const void *values, const int64_t dtype,
                           const int scaled) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    const __m512 scale0 = scaled ? _mm512_loadu_ps(p->column_scale) : one, scale1 = scaled ? _mm512_loadu_ps(p->column_scale + 16) : one;
    const __m512 bias0 = p->bias ? _mm512_loadu_ps(p->bias) : zero, bias1 = p->bias ? _mm512_loadu_ps(p->bias + 16) : zero;
    for (int m = 0; m < rows; m++) {
        const __m512 factor = _mm512_set1_ps(p->row_scale[row + m]);
        __m512 a, b;
        if (scaled) {
            const int32_t *sums = (const int32_t *)values + m * COLUMNS;
            a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), scale0);
            b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16)), scale1);
        } else {
            a = _mm512_load_ps((const float *)values + m * COLUMNS);
            b = _mm512_load_ps((const float *)values + m * COLUMNS + 16);
        }
        a = _mm512_fmadd_ps(a, factor, bias0);
        b = _mm512_fmadd_ps(b, factor, bias1);
        if (dtype == DT_FLOAT32) {
            float *out = (float *)p->out + (row + m) * p->out_stride;
            _mm512_storeu_ps(out, a);
            _mm512_storeu_ps(out + 16, b);
        } else if (dtype == DT_BFLOAT16) {
            _mm512_storeu_si512((uint16_t *)p->out + (row + m) * p->out_stride, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        } else {
            uint16_t *out = (uint16_t *)p->out + (row + m) * p->out_stride;
            _mm256_storeu_si256((__m256i *)out, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
            _mm256_storeu_si256((__m256i *)(out + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
        }
    }
}

AMX INLINE void store(const dt_panel *p, int64_t row, int rows, const void *values, const int scaled) {
    if (p->columns < COLUMNS) {
        for (int m = 0; m < rows; m++) {
            char *out = (char *)p->out + (row + m) * p->out_stride * (p->dtype == DT_FLOAT32 ? 4 : 2);
            dt_store_avx2((const int32_t *)values + m * COLUMNS, scaled ? p->column_scale : NULL, p->row_scale[row + m],
                          p->bias, out, p->dtype, p->columns);
        }
    } else if (p->dtype == DT_FLOAT32) {
        store_rows(p, row, rows, values, DT_FLOAT32, scaled);
    } else if (p->dtype == DT_BFLOAT16) {
        store_rows(p, row, rows, values, DT_BFLOAT16, scaled);
    } else {
        store_rows(p, row, rows, values, DT_FLOAT16, scaled);
    }
}

AMX static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = TILE;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(tiles) : "memory");
}

AMX static void release(void) { __asm__ volatile("tilerelease" : : : "memory"); }

AMX static void multiply(const dt_panel *p) {
    int32_t sums[ROWS * COLUMNS] __attribute__((aligned(64)));
    float values[ROWS * COLUMNS] __attribute__((aligned(64)));
    if (!p->plan->natural) decode_padded(p);
    else if (p->multipliers) decode_natural(p, 1);
    else decode_natural(p, 0);
    // steps up to the end of the last tile: x is 0 there
    const ptrdiff_t used = (ptrdiff_t)p->plan->steps, end = (used + TILE_STEPS - 1) / TILE_STEPS * TILE_STEPS;
    memset(p->panel + used * STEP_BYTES, 0, (size_t)(end - used) * STEP_BYTES);
    for (int64_t row = 0; row < p->rows; row += ROWS) {
        const int rows = p->rows - row < ROWS ? (int)(p->rows - row) : ROWS;
        if (p->sums) {
            sum_rows(p, row, rows, 0, p->plan->steps, sums);
            memcpy(p->sums + row * COLUMNS, sums, (size_t)rows * COLUMNS * 4);
        } else if (!p->group_scale) {
            sum_rows(p, row, rows, 0, p->plan->steps, sums);
            store(p, row, rows, sums, 1);
        } else {
            for (int32_t i = 0; i < p->plan->run_count; i++) {
                const dt_run *run = &p->plan->runs[i];
                sum_rows(p, row, rows, run->step, run->steps, sums);
                accumulate(sums, p->group_scale + (ptrdiff_t)run->group * COLUMNS, rows, i == 0, values);
            }
            store(p, row, rows, values, 0);
        }
    }
}

// The processor has the instructions, and the system gives this process leave to use the tiles.
static int find_support(void) {
    enum { ARCH_REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return dt_x86_has(DT_X86_AMX_INT8) && syscall(SYS_arch_prctl, ARCH_REQUEST_PERMISSION, TILE_DATA) == 0;
}

static int supported(void) {
    static int known = -1;  // threads that meet here find the same answer
    if (known < 0) known = find_support();
    return known;
}

const dt_variant dt_amx_int8 = {
    .name = "amx-int8",
    .supported = supported,
    .tile_rows = ROWS,
    .row_multiple = TILE,
    .tile_columns = COLUMNS,
    .run_steps = 1 << 20,
    .block_steps = 1 << 20,
    .group_steps = TILE_STEPS,
    .x_rows = TILE,
    .x_bytes = 64,
    .block_bytes = 1200 << 10,
    .gemv_align = 64,
    .gemv_run_steps = 4096,
    .gemv_max_rows = 4,
    .absmax = dt_absmax_avx512,
    .quantize = dt_quantize_avx512,
    .sum = dt_sum_avx2,
    .correction = dt_correction_vnni,
    .begin = configure,
    .end = release,
    .multiply = multiply,
    .gemv = dt_gemv_avx512,
    .scales = dt_scales_avx2,
    .expand = dt_expand_avx2,
    .store = dt_store_avx2,
};
#endif
