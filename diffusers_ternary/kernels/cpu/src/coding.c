// SPDX-License-Identifier: Apache-2.0
// The inner loops of calibration on a transposed float32 weight [columns, rows]: choosing the codes of a panel of
// columns one after the other, and summing over the columns of each group.
#include <stdlib.h>
#include <string.h>

#include "ternary.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // a - b * c in one instruction where there is one, as clang does by itself
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16   // rows of the weight that go through a panel together, in a vector of the widest kind
#define STEP 8     // columns after which the others of the panel are brought up to date
#define WIDTH 16   // vectors of sums
#define PARTIAL 64 // columns that are summed in float before double takes over

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes_int __attribute__((vector_size(4 * LANES)));
typedef int8_t lanes_code __attribute__((vector_size(LANES)));

typedef struct {
    const float *matrix;   // [columns][stride], read above its diagonal: what a step of column j moves column i by
    const float *inverse;  // [columns], or NULL for GPTQ
    const float *scales;   // [groups][rows]
    float *values;         // [columns][rows]
    float *residual;       // [columns][rows], or NULL
    int8_t *codes;         // [columns][rows]
    int64_t stride, columns, rows, first, group_size, parts;
    int64_t results[256];
} dt_coding_call;

typedef struct {
    const float *product;  // [columns][product_stride]
    const int8_t *codes;   // [columns][code_stride]
    double *sums;          // [groups][rows]
    int64_t product_stride, code_stride, columns, rows, group_size;
} dt_sum_call;

// LANES rows of a panel, or `count` at the end. Descent: a value is the gradient of a column, whose code becomes the
// one nearest to what it stands for plus value * inverse; columns whose inverse is 0 keep theirs. GPTQ: a value is
// what the column should be. Returns how many codes changed.
INLINE int64_t code_panel(const dt_coding_call *call, int64_t row, const size_t count, const int descends, lanes *values) {
    const int64_t rows = call->rows, columns = call->columns, stride = call->stride;
    lanes_int changed = {0};
    for (int64_t i = 0; i < columns; i++) {
        values[i] = (lanes){0};
        memcpy(&values[i], call->values + i * rows + row, 4 * count);
    }
    for (int64_t block = 0; block < columns; block += STEP) {
        const int64_t stop = columns - block < STEP ? columns : block + STEP;
        lanes steps[STEP] = {{0}};
        lanes_int moved = {0};
        for (int64_t j = block; j < stop; j++) {
            if (descends && call->inverse[j] == 0.0f) continue;
            lanes scale = {0}, current = values[j], wanted = current;
            memcpy(&scale, call->scales + (call->first + j) / call->group_size * rows + row, 4 * count);
            lanes_code code = {0};
            lanes_int before = {0};
            int8_t *codes = call->codes + j * rows + row;
            if (descends) {
                memcpy(&code, codes, count);
                before = __builtin_convertvector(code, lanes_int);
                current = __builtin_convertvector(before, lanes) * scale;
                wanted = current + values[j] * call->inverse[j];
            }
            const lanes half = 0.5f * scale;
            const lanes_int after = ((wanted < -half) - (wanted > half)) & (scale > 0.0f);
            const lanes step = __builtin_convertvector(after, lanes) * scale - current;
            const lanes_int differs = after != before;
            changed -= differs;
            moved |= differs;
            code = __builtin_convertvector(after, lanes_code);
            memcpy(codes, &code, count);
            if (descends) {
                float *target = call->residual + j * rows + row;
                lanes residual = {0};
                memcpy(&residual, target, 4 * count);
                residual -= step;
                memcpy(target, &residual, 4 * count);
            }
            steps[j - block] = step;
            for (int64_t i = j + 1; i < stop; i++) values[i] -= call->matrix[j * stride + i] * step;
        }
        int32_t any = !descends;
        for (int l = 0; l < LANES; l++) any |= moved[l];
        if (!any) continue;
        const float *m = call->matrix + block * stride;
        for (int64_t i = stop; i < columns; i++) {  // a block that is not full has no columns after it
            lanes value = values[i];
#pragma GCC unroll 8
            for (int j = 0; j < STEP; j++) value -= m[j * stride + i] * steps[j];
            values[i] = value;
        }
    }
    int64_t total = 0;
    for (size_t l = 0; l < count; l++) total += changed[l];
    return total;
}

INLINE int64_t code_rows(const dt_coding_call *call, int64_t first, int64_t last, lanes *values) {
    int64_t changed = 0, row = first;
    if (call->inverse) {
        for (; row + LANES <= last; row += LANES) changed += code_panel(call, row, LANES, 1, values);
        if (row < last) changed += code_panel(call, row, (size_t)(last - row), 1, values);
    } else {
        for (; row + LANES <= last; row += LANES) changed += code_panel(call, row, LANES, 0, values);
        if (row < last) changed += code_panel(call, row, (size_t)(last - row), 0, values);
    }
    return changed;
}

// `count` rows from `row` on, at most WIDTH vectors of them, whose sums stay in the first-level cache.
INLINE void sum_panel(const dt_sum_call *call, int64_t row, const int64_t count) {
    double *sums = call->sums + row;
    for (int64_t start = 0; start < call->columns; start += call->group_size, sums += call->rows) {
        const int64_t stop = call->columns - start < call->group_size ? call->columns : start + call->group_size;
        memset(sums, 0, 8 * (size_t)count);
        for (int64_t k = start; k < stop;) {
            float partial[WIDTH * LANES] = {0};
            for (const int64_t end = stop - k < PARTIAL ? stop : k + PARTIAL; k < end; k++) {
                const float *value = call->product + k * call->product_stride + row;
                const int8_t *code = call->codes + k * call->code_stride + row;
                for (int64_t n = 0; n < count; n++) partial[n] += value[n] * (float)code[n];
            }
            for (int64_t n = 0; n < count; n++) sums[n] += partial[n];
        }
    }
}

INLINE void sum_rows(const dt_sum_call *call) {
    for (int64_t row = 0; row < call->rows; row += WIDTH * LANES) {
        if (call->rows - row >= WIDTH * LANES) sum_panel(call, row, WIDTH * LANES);
        else sum_panel(call, row, call->rows - row);
    }
}

#define VARIANT(name, target)                                                                                   \
    target static int64_t code_##name(const dt_coding_call *call, int64_t first, int64_t last, lanes *values) { \
        return code_rows(call, first, last, values);                                                            \
    }                                                                                                           \
    target static void sum_##name(const dt_sum_call *call) { sum_rows(call); }

VARIANT(plain, )
#ifdef DT_X86
VARIANT(avx2, __attribute__((target("avx2,fma"))))
VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))))
#define CHOOSE(kind) (dt_avx512_vnni.supported() ? kind##_avx512 : dt_avx2.supported() ? kind##_avx2 : kind##_plain)
#else
#define CHOOSE(kind) kind##_plain
#endif

static void code_part(void *context, int64_t part) {
    dt_coding_call *call = context;
    const int64_t panels = (call->rows + LANES - 1) / LANES;
    const int64_t first = panels * part / call->parts * LANES, end = panels * (part + 1) / call->parts * LANES;
    char *memory = malloc((size_t)(call->columns + 1) * sizeof(lanes));
    call->results[part] = DT_ERROR_MEMORY;
    if (!memory) return;
    lanes *values = (lanes *)(((uintptr_t)memory + sizeof(lanes) - 1) / sizeof(lanes) * sizeof(lanes));
    call->results[part] = CHOOSE(code)(call, first, end < call->rows ? end : call->rows, values);
    free(memory);
}

// Codes of `columns` consecutive columns, the first of which is column `first` of its groups, by `workers` threads.
// Returns how many changed; in GPTQ (without `inverse`), how many are not 0.
DT_EXPORT int64_t dt_code_columns(const float *matrix, int64_t stride, const float *inverse, const float *scales,
                                  float *values, float *residual, int8_t *codes, int64_t columns, int64_t rows,
                                  int64_t first, int64_t group_size, int64_t workers) {
    dt_coding_call call = {matrix, inverse,    scales, values, residual, codes, stride, columns, rows,
                           first,  group_size, workers, {0}};
    const int64_t panels = (rows + LANES - 1) / LANES;
    if (call.parts > panels) call.parts = panels;
    if (call.parts > 256) call.parts = 256;
    dt_parallel(code_part, &call, call.parts);
    int64_t changed = 0;
    for (int64_t i = 0; i < call.parts; i++) {
        if (call.results[i] < 0) return call.results[i];
        changed += call.results[i];
    }
    return changed;
}

// Sums product [columns][product_stride] times codes [columns][code_stride] over the columns of each group into `sums`
// [groups][rows].
DT_EXPORT int64_t dt_group_sums(const float *product, int64_t product_stride, const int8_t *codes, int64_t code_stride,
                                int64_t columns, int64_t rows, int64_t group_size, double *sums) {
    const dt_sum_call call = {product, codes, sums, product_stride, code_stride, columns, rows, group_size};
    CHOOSE(sum)(&call);
    return 0;
}
