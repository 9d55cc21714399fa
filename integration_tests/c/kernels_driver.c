// SPDX-License-Identifier: Apache-2.0
// Runs every kernel variant of this CPU against naive loops, on buffers of the exact size, so that a sanitizer (or an
// emulator) sees any read or write past an end. Exit status 0 means that all agree.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../diffusers_ternary/kernels/cpu/src/convert.h"
#include "../../diffusers_ternary/kernels/cpu/src/ternary.h"

int64_t dt_abi_version(void);
const char *dt_variant_name(int64_t index);
int64_t dt_variant_supported(int64_t index);
int64_t dt_linear(const dt_args *args, int64_t workers);
int64_t dt_accumulate(const dt_args *args, const int8_t *x, int32_t *out);
int64_t dt_quantize_rows(const dt_args *args, int8_t *q, float *scales);
int64_t dt_dequantize(const dt_args *args, int64_t n0, int64_t n1, float *out, int64_t workers);

static uint64_t state;

static uint32_t draw(uint32_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % limit;
}

static float draw_float(void) { return (float)draw(20001) / 10000.0f - 1.0f; }

static void *memory(int64_t bytes) {
    void *result = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (!result) exit(2);
    return result;
}

typedef struct {
    int64_t rows, columns, in_features, group_size, groups, plane_bytes;
    int64_t x_dtype, scale_dtype, bias_dtype;
    int extreme, double_scales, bias;
} problem;

typedef struct {
    int8_t *codes, *weight, *q;
    void *x, *scale, *bias, *out;
    uint8_t *multiplier;
    dt_args args;
} buffers;

static int64_t bytes_of(int64_t dtype) { return dtype == DT_FLOAT32 ? 4 : 2; }

static buffers build(const problem *p, int64_t variant) {
    buffers b = {0};
    b.codes = memory(p->columns * p->in_features);
    b.weight = memory(p->columns * p->plane_bytes);
    b.q = memory(p->rows * p->in_features);
    b.x = memory(p->rows * p->in_features * bytes_of(p->x_dtype));
    b.out = memory(p->rows * p->columns * bytes_of(p->x_dtype));
    const int64_t scales = p->columns * (p->double_scales ? 1 : p->groups);
    b.scale = memory(scales * bytes_of(p->scale_dtype));
    b.bias = memory(p->columns * bytes_of(p->bias_dtype));
    b.multiplier = memory(p->columns * p->groups);
    const int8_t sign = draw(2) ? 1 : -1;
    memset(b.weight, 0, (size_t)(p->columns * p->plane_bytes));
    for (int64_t n = 0; n < p->columns; n++) {
        for (int64_t k = 0; k < p->in_features; k++) {
            const int8_t code = p->extreme ? sign : (int8_t)((int)draw(3) - 1);
            b.codes[n * p->in_features + k] = code;
            uint8_t *byte = (uint8_t *)b.weight + n * p->plane_bytes + k % p->plane_bytes;
            *byte = (uint8_t)(*byte | (code & 3) << (6 - 2 * (k / p->plane_bytes)));
        }
    }
    for (int64_t i = 0; i < p->rows * p->in_features; i++) {
        b.q[i] = p->extreme ? (int8_t)(draw(64) ? 127 : -127) : (int8_t)((int)draw(255) - 127);
        dt_store(b.x, p->x_dtype, i, draw_float() * 3.0f);
    }
    for (int64_t i = 0; i < scales; i++) dt_store(b.scale, p->scale_dtype, i, 0.5f + 0.4f * draw_float());
    for (int64_t i = 0; i < p->columns; i++) dt_store(b.bias, p->bias_dtype, i, draw_float());
    for (int64_t i = 0; i < p->columns * p->groups; i++) b.multiplier[i] = (uint8_t)draw(64);
    b.args = (dt_args){variant, (intptr_t)b.x, p->in_features, p->x_dtype, (intptr_t)b.weight, (intptr_t)b.scale,
                       p->scale_dtype, p->double_scales ? (intptr_t)b.multiplier : 0, p->bias ? (intptr_t)b.bias : 0,
                       p->bias_dtype, (intptr_t)b.out, p->columns, p->rows, p->columns, p->in_features, p->group_size};
    return b;
}

static void release(buffers *b) {
    void *all[] = {b->codes, b->weight, b->q, b->x, b->scale, b->bias, b->out, b->multiplier};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) free(all[i]);
}

static float scale_of(const problem *p, const buffers *b, int64_t n, int64_t g) {
    if (!p->double_scales) return dt_load(b->scale, p->scale_dtype, n * p->groups + g);
    return dt_load(b->scale, p->scale_dtype, n) * (float)b->multiplier[n * p->groups + g] / 63.0f;
}

// The int32 sums are equal, bit for bit.
static int sums_agree(const problem *p, const buffers *b) {
    const int64_t size = p->rows * p->groups * p->columns;
    int32_t *sums = memory(size * 4);
    int agree = dt_accumulate(&b->args, b->q, sums) == 0;
    for (int64_t i = 0; agree && i < size; i++) {
        const int64_t n = i % p->columns, g = i / p->columns % p->groups, m = i / p->columns / p->groups;
        const int64_t end = (g + 1) * p->group_size < p->in_features ? (g + 1) * p->group_size : p->in_features;
        int64_t sum = 0;
        for (int64_t k = g * p->group_size; k < end; k++) {
            sum += b->codes[n * p->in_features + k] * b->q[m * p->in_features + k];
        }
        agree = sums[i] == sum;
    }
    free(sums);
    return agree;
}

// The whole layer agrees with doubles on the layer's own int8 rows, and gives the same bits on three threads.
static int layer_agrees(const problem *p, const buffers *b) {
    int8_t *q = memory(p->rows * p->in_features);
    float *row_scales = memory(p->rows * 4), *dense = memory(p->columns * p->in_features * 4);
    void *whole = memory(p->rows * p->columns * bytes_of(p->x_dtype));
    int agree = dt_quantize_rows(&b->args, q, row_scales) == 0 && dt_linear(&b->args, 1) == 0;
    memcpy(whole, b->out, (size_t)(p->rows * p->columns * bytes_of(p->x_dtype)));
    memset(b->out, 0, (size_t)(p->rows * p->columns * bytes_of(p->x_dtype)));
    agree = agree && dt_linear(&b->args, 3) == 0 && dt_dequantize(&b->args, 0, p->columns, dense, 3) == 0;
    agree = agree && memcmp(whole, b->out, (size_t)(p->rows * p->columns * bytes_of(p->x_dtype))) == 0;
    const double precision = p->x_dtype == DT_FLOAT32 ? 4e-6 : p->x_dtype == DT_FLOAT16 ? 2e-3 : 1e-2;
    for (int64_t i = 0; agree && i < p->rows * p->columns; i++) {
        const int64_t m = i / p->columns, n = i % p->columns;
        double value = 0.0, size = 1e-6;
        for (int64_t k = 0; k < p->in_features; k++) {
            const float expected = (float)b->codes[n * p->in_features + k] * scale_of(p, b, n, k / p->group_size);
            agree = agree && dense[n * p->in_features + k] == expected;
            value += (double)q[m * p->in_features + k] * expected;
            size += fabs((double)q[m * p->in_features + k] * expected);
        }
        const double bias = p->bias ? dt_load(b->bias, p->bias_dtype, n) : 0.0;
        const double expected = value * row_scales[m] + bias;
        const double error = fabs(dt_load(b->out, p->x_dtype, i) - expected);
        agree = agree && error <= precision * (size * row_scales[m] + fabs(bias));
    }
    void *all[] = {q, row_scales, dense, whole};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) free(all[i]);
    return agree;
}

static int64_t last_variant(void) {
    int64_t variant = 0;
    while (dt_variant_name(variant + 1)) variant++;
    return variant;
}

// Rows of tiny values, with an infinity, with NaN and of zeros are quantized as plain C quantizes them, and a row
// without a scale is NaN in the output.
static int rows_agree(const problem *p, const buffers *b) {
    static const float SPECIAL[] = {1e-7f, INFINITY, NAN, 0.0f};
    const int64_t size = p->rows * p->in_features;
    int8_t *q[2] = {memory(size), memory(size)};
    float *scales[2] = {memory(p->rows * 4), memory(p->rows * 4)};
    char *x = memory(size * bytes_of(p->x_dtype));
    memcpy(x, b->x, (size_t)(size * bytes_of(p->x_dtype)));
    for (int64_t m = 0; m < p->rows && m < 4; m++) {
        const int all = SPECIAL[m] < 1.0f;
        for (int64_t k = 0; all && k < p->in_features; k++) {
            dt_store(x, p->x_dtype, m * p->in_features + k, SPECIAL[m] * draw_float());
        }
        if (!all) dt_store(x, p->x_dtype, m * p->in_features + (int64_t)draw((uint32_t)p->in_features), SPECIAL[m]);
    }
    dt_args ours = b->args, plain = b->args;
    ours.x = plain.x = (intptr_t)x;
    plain.variant = last_variant();
    const int64_t infinite = dt_quantize_rows(&plain, q[1], scales[1]);
    int agree = dt_quantize_rows(&ours, q[0], scales[0]) == infinite && dt_linear(&ours, 1) == infinite;
    agree = agree && memcmp(q[0], q[1], (size_t)size) == 0 && infinite == (p->rows > 1);
    for (int64_t m = 0; agree && m < p->rows; m++) {
        const int none = isnan(scales[1][m]) != 0;
        agree = none ? isnan(scales[0][m]) != 0 : scales[0][m] == scales[1][m];
        for (int64_t n = 0; agree && n < p->columns; n++) {
            agree = (isnan(dt_load(b->out, p->x_dtype, m * p->columns + n)) != 0) == none;
        }
    }
    void *all[] = {q[0], q[1], scales[0], scales[1], x};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) free(all[i]);
    return agree;
}

int main(int count, char **values) {
    static const int64_t ROWS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 23, 25, 31, 37, 64, 97};
    static const int64_t COLUMNS[] = {1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 47, 64, 65};
    static const int64_t FEATURES[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 131, 255, 257, 509, 513, 1024, 1027};
    static const int64_t GROUPS[] = {1, 2, 3, 7, 16, 31, 32, 33, 64, 100, 128, 1 << 20, 1 << 20, 1 << 20};
    const int rounds = count > 1 ? atoi(values[1]) : 150;
    state = count > 2 ? (uint64_t)atoll(values[2]) : 1;
    int failures = 0;
    for (int64_t variant = 0; dt_variant_name(variant); variant++) {
        if (!dt_variant_supported(variant)) {
            printf("%s: not on this CPU\n", dt_variant_name(variant));
            continue;
        }
        for (int i = 0; i < rounds; i++) {
            problem p = {.rows = ROWS[draw(20)], .columns = COLUMNS[draw(16)], .in_features = FEATURES[draw(25)]};
            const int64_t group = GROUPS[draw(14)];
            p.group_size = group < p.in_features ? group : p.in_features;
            p.groups = (p.in_features + p.group_size - 1) / p.group_size;
            p.plane_bytes = (p.in_features + 3) / 4;
            p.x_dtype = draw(3);
            p.scale_dtype = draw(3);
            p.bias_dtype = draw(3);
            p.extreme = draw(4) == 0;
            p.double_scales = draw(2) == 0;
            p.bias = draw(2) == 0;
            buffers b = build(&p, variant);
            const int sums = sums_agree(&p, &b), layer = layer_agrees(&p, &b), rows = rows_agree(&p, &b);
            if (!sums || !layer || !rows) {
                failures++;
                printf("%s: %s differ at rows=%lld columns=%lld in_features=%lld group_size=%lld dtypes=%lld,%lld,%lld\n",
                       dt_variant_name(variant), !sums ? "sums" : layer ? "int8 rows" : "outputs", (long long)p.rows, (long long)p.columns,
                       (long long)p.in_features, (long long)p.group_size, (long long)p.x_dtype,
                       (long long)p.scale_dtype, (long long)p.bias_dtype);
            }
            release(&b);
        }
        printf("%s: %d problems\n", dt_variant_name(variant), rounds);
    }
    return failures ? 1 : 0;
}
