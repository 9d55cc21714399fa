// SPDX-License-Identifier: Apache-2.0
// Plain C: the twin of every vector kernel, and what serves a CPU that has none.
#include <math.h>
#include <string.h>

#include "convert.h"
#include "ternary.h"

enum { TILE_ROWS = 4, TILE_COLUMNS = 16 };

const uint8_t *dt_readable(const uint8_t *source, const uint8_t *end, size_t length, uint8_t *copy) {
    if ((size_t)(end - source) >= length) return source;
    memset(copy, 0, length);
    memcpy(copy, source, (size_t)(end - source));
    return copy;
}

uint32_t dt_absmax_scalar(const void *x, int64_t dtype, int64_t n) {
    uint32_t largest = 0;  // magnitudes order like their bits, with NaN above infinity
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = dt_bits(dt_load(x, dtype, i)) & 0x7fffffffu;
        if (bits > largest) largest = bits;
    }
    return largest;
}

void dt_quantize_scalar(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q) {
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)rintf(dt_load(x, dtype, i) * prescale * inverse);
}

int32_t dt_sum_scalar(const int8_t *q, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += q[i];
    return sum;
}

int32_t dt_correction_scalar(const int8_t *q, int64_t n) { return -dt_sum_scalar(q, n); }

void dt_scales_scalar(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out) {
    for (int64_t i = 0; i < rows * groups; i++) {
        out[i] = multiplier ? dt_load(scale, dtype, i / groups) * (float)multiplier[i] / 63.0f : dt_load(scale, dtype, i);
    }
}

void dt_expand_scalar(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out) {
    for (int64_t i = 0; i < n; i++) {
        // the two code bits, sign-extended from the top of the byte
        const int8_t code = (int8_t)((uint32_t)bytes[i] << (6 - shift));
        out[i] = (float)(code >> 6) * scale;
    }
}

void dt_store_scalar(const void *c, const float *column_scale, float row_scale, const float *bias, void *out,
                     int64_t dtype, int32_t columns) {
    for (int32_t n = 0; n < columns; n++) {
        const float value = column_scale ? (float)((const int32_t *)c)[n] * column_scale[n] : ((const float *)c)[n];
        dt_store(out, dtype, n, value * row_scale + (bias ? bias[n] : 0.0f));
    }
}

static void decode(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                   int32_t columns, int32_t tile_columns, uint8_t *panel) {
    (void)weight_end;
    for (int32_t i = 0; i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        for (int32_t s = 0; s < segment->steps; s++) {
            const int32_t at = segment->step + s - step;
            if (at < 0 || at >= steps) continue;
            for (int32_t n = 0; n < tile_columns; n++) {
                const uint8_t *row = weight + (n < columns ? n : columns - 1) * plan->plane_bytes + segment->byte;
                for (int32_t k = 0; k < 4; k++) {
                    const int32_t offset = 4 * s + k;
                    const uint32_t code = offset < segment->length ? (uint32_t)row[offset] >> segment->shift : 0;
                    panel[((ptrdiff_t)at * tile_columns + n) * 4 + k] = (uint8_t)((code + 1) & 3);
                }
            }
        }
    }
}

static void tile(const dt_tile *t, int32_t rows) {
    for (int32_t i = 0; i < t->run_count; i++) {
        const dt_run *run = &t->runs[i];
        for (int32_t m = 0; m < rows; m++) {
            int32_t sums[TILE_COLUMNS];
            for (int32_t n = 0; n < TILE_COLUMNS; n++) sums[n] = t->correction[m * t->correction_stride + i];
            for (int32_t s = run->step - t->step; s < run->step - t->step + run->steps; s++) {
                const uint8_t *u = t->panel + (ptrdiff_t)s * TILE_COLUMNS * 4;
                const int8_t *x = t->x + m * t->x_stride + 4 * (ptrdiff_t)s;
                for (int32_t n = 0; n < TILE_COLUMNS; n++) {
                    sums[n] += u[4 * n] * x[0] + u[4 * n + 1] * x[1] + u[4 * n + 2] * x[2] + u[4 * n + 3] * x[3];
                }
            }
            for (int32_t n = 0; n < TILE_COLUMNS; n++) {
                const int32_t at = m * TILE_COLUMNS + n;
                if (t->group_scale) {
                    ((float *)t->c)[at] += (float)sums[n] * t->group_scale[(ptrdiff_t)run->group * TILE_COLUMNS + n];
                } else {
                    ((int32_t *)t->c)[at] += sums[n];
                }
            }
        }
    }
}

static void gemv(const dt_gemv *g) {
    for (int32_t n = 0; n < g->columns; n++) {
        const uint8_t *row = g->weight + n * g->plane_bytes;
        row = dt_readable(row, g->weight_end, (size_t)g->plane_bytes + 64, g->row_copy);
        for (int32_t m = 0; m < g->rows; m++) {
            const ptrdiff_t at = (ptrdiff_t)m * g->tile_columns + n;
            for (int32_t i = 0; i < g->run_count; i++) {
                const dt_run *run = &g->runs[i];
                const int8_t *x = g->x + m * g->x_stride + 4 * (ptrdiff_t)run->step;
                int32_t sum = g->correction[m * g->correction_stride + i];
                for (int32_t k = 0; k < 4 * run->steps; k++) {
                    sum += (int32_t)((((uint32_t)row[run->byte + k] >> run->shift) + 1) & 3) * x[k];
                }
                if (g->group_scale) {
                    ((float *)g->c)[at] += (float)sum * g->group_scale[n * g->groups + run->group];
                } else {
                    ((int32_t *)g->c)[at] += sum;
                }
            }
        }
    }
}

static int supported(void) { return 1; }

const dt_variant dt_scalar = {
    .name = "scalar",
    .supported = supported,
    .tile_rows = TILE_ROWS,
    .row_multiple = 1,
    .tile_columns = TILE_COLUMNS,
    .run_steps = 256,
    .block_steps = 256,
    .gemv_align = 16,
    .gemv_run_steps = 256,
    .gemv_max_rows = 8,
    .absmax = dt_absmax_scalar,
    .quantize = dt_quantize_scalar,
    .sum = dt_sum_scalar,
    .correction = dt_correction_scalar,
    .decode = decode,
    .tile = tile,
    .gemv = gemv,
    .scales = dt_scales_scalar,
    .expand = dt_expand_scalar,
    .store = dt_store_scalar,
};
