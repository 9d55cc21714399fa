// SPDX-License-Identifier: Apache-2.0
// The layer: quantize rows of x, run the tiles (or the GEMV) over packed panels, scale and store.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "convert.h"
#include "ternary.h"

enum {
    CACHE_LINE = 64,
    ROW_BLOCK = 384,          // of variants without block_bytes
    LEAST_ROWS = 96,          // fewer would decode the weight too often
    MOST_ROWS = 1056,
    GEMV_LEAST_GROUP = 32,    // shorter groups would pad every vector of the GEMV
    ROWS_PER_PART = 256,      // from here each part quantizes its own rows and decodes the whole weight for them
    ROW_MULTIPLE = 96,        // a multiple of the tallest tiles, 12 and 32
    MOST_PARTS = 256,
};

static const dt_variant *const VARIANTS[] = {
#ifdef DT_AMX
    &dt_amx_int8,
#endif
#ifdef DT_X86
    &dt_avx512_vnni, &dt_avx_vnni, &dt_avx2,
#endif
#ifdef DT_NEON
    &dt_neon_i8mm, &dt_neon_dotprod,
#endif
    &dt_scalar,
};
enum { VARIANT_COUNT = sizeof(VARIANTS) / sizeof(VARIANTS[0]) };

// Everything that depends on the shape but not on the data.
typedef struct {
    const dt_variant *variant;
    dt_plan plan;
    int use_gemv;
    int tiled;   // the variant's `multiply` serves
    int folded;  // multipliers are part of the codes
    int corrected;  // codes are unsigned, their surplus is taken off
    int32_t x_rows;  // of the variant, or 1
    int64_t padded_rows;
    ptrdiff_t x_stride;  // bytes between quantized rows
    size_t scale_bytes, correction_bytes, x_bytes;
} dt_shape;

static void *pointer(int64_t address) { return (void *)(intptr_t)address; }

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static int64_t element_bytes(int64_t dtype) { return dtype == DT_FLOAT32 ? 4 : 2; }

static void *aligned_memory(size_t bytes, void **base) {
    *base = malloc(bytes + CACHE_LINE);
    if (!*base) return NULL;
    return (void *)(((uintptr_t)*base + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
}

static int shape_build(dt_shape *shape, const dt_args *args, int64_t rows) {
    if (args->variant < 0 || args->variant >= VARIANT_COUNT || !VARIANTS[args->variant]->supported()) {
        shape->plan.segments = NULL;
        return DT_ERROR_VARIANT;
    }
    const dt_variant *v = VARIANTS[args->variant];
    shape->variant = v;
    shape->use_gemv =
        args->rows <= v->gemv_max_rows && (args->group_size >= GEMV_LEAST_GROUP || args->group_size >= args->in_features);
    shape->tiled = !shape->use_gemv && v->multiply;
    shape->folded = shape->tiled && args->multiplier;
    shape->corrected = !shape->tiled && v->correction;
    shape->x_rows = shape->use_gemv || !v->x_rows ? 1 : v->x_rows;
    dt_plan_options options = {4, v->run_steps, v->block_steps, 1, shape->folded, v->group_steps ? v->group_steps : 1};
    if (shape->use_gemv) options = (dt_plan_options){v->gemv_align, v->gemv_run_steps, v->gemv_run_steps, 0, 0, 1};
    const int error = dt_plan_build(&shape->plan, args->in_features, args->group_size, options);
    if (error) return error;
    shape->padded_rows = shape->use_gemv ? rows : round_up(rows, v->row_multiple);
    // an odd number of cache lines: rows of a power of two would share one cache set
    shape->x_stride = (ptrdiff_t)round_up(4 * (int64_t)shape->plan.steps, CACHE_LINE);
    if (!shape->tiled && shape->x_stride / CACHE_LINE % 2 == 0) shape->x_stride += CACHE_LINE;
    shape->scale_bytes = (size_t)round_up(shape->padded_rows * 4, CACHE_LINE);
    shape->correction_bytes =
        shape->corrected ? (size_t)round_up(shape->padded_rows * shape->plan.run_count * 4, CACHE_LINE) : 0;
    shape->x_bytes = (size_t)(shape->padded_rows * shape->x_stride);
    return 0;
}

// Bytes of quantized rows: row scales, corrections, int8 values.
static size_t prepared_bytes(const dt_shape *shape) { return shape->scale_bytes + shape->correction_bytes + shape->x_bytes; }

static void correct_runs(const dt_shape *shape, const int8_t *q, int32_t *correction) {
    for (int32_t i = 0; i < shape->plan.run_count; i++) {
        const int8_t *start = q + 4 * (ptrdiff_t)shape->plan.runs[i].step;
        const int64_t columns = 4 * (int64_t)shape->plan.runs[i].steps;
        correction[i] = shape->use_gemv ? -shape->variant->sum(start, columns) : shape->variant->correction(start, columns);
    }
}

// Where byte 0 of a row lies among `x_rows` rows.
static int8_t *row_start(const dt_shape *shape, const int8_t *q, int64_t m) {
    return (int8_t *)q + m / shape->x_rows * shape->x_rows * shape->x_stride + m % shape->x_rows * shape->variant->x_bytes;
}

static void put_row(const dt_shape *shape, const int8_t *row, int64_t m, int8_t *q) {
    int8_t *target = row_start(shape, q, m);
    const ptrdiff_t bytes = shape->variant->x_bytes;
    for (ptrdiff_t k = 0; k < shape->x_stride; k += bytes) {
        if (bytes == CACHE_LINE) memcpy(target + k * shape->x_rows, row + k, CACHE_LINE);
        else memcpy(target + k * shape->x_rows, row + k, 8);
    }
}

static void get_row(const dt_shape *shape, const int8_t *q, int64_t m, int8_t *row) {
    const int8_t *source = row_start(shape, q, m);
    const ptrdiff_t bytes = shape->variant->x_bytes;
    for (ptrdiff_t k = 0; k < shape->x_stride; k += bytes) memcpy(row + k, source + k * shape->x_rows, (size_t)bytes);
}

static void quantize_row(const dt_shape *shape, const void *x, int64_t dtype, float *scale, int32_t *correction,
                         int8_t *q, int8_t *plain, int64_t *infinite_rows) {
    const dt_plan *plan = &shape->plan;
    const uint32_t largest = shape->variant->absmax(x, dtype, plan->in_features);
    // 2^100 lifts subnormal rows, whose 127 / absmax would overflow
    const float prescale = largest < 0x10000000u ? 0x1p100f : 1.0f;
    const float absmax = dt_float(largest) * prescale;
    if (shape->corrected) memset(correction, 0, (size_t)plan->run_count * 4);
    if (largest >= 0x7f800000u || !(absmax > 0.0f)) {
        if (largest == 0x7f800000u) ++*infinite_rows;
        *scale = largest >= 0x7f800000u ? NAN : 0.0f;
        memset(q, 0, (size_t)shape->x_stride);
        return;
    }
    *scale = absmax / 127.0f / prescale;
    const int padded = 4 * (int64_t)plan->steps != plan->in_features;
    int8_t *dense = padded ? plain : q;
    shape->variant->quantize(x, dtype, plan->in_features, prescale, 127.0f / absmax, dense);
    if (padded && shape->x_rows > 1) memset(q, 0, (size_t)shape->x_stride);  // there are gaps between groups
    for (int32_t i = 0; padded && i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        int8_t *target = q + 4 * (ptrdiff_t)segment->step;
        memcpy(target, dense + segment->column, (size_t)segment->length);
        memset(target + segment->length, 0, (size_t)(4 * segment->steps - segment->length));
    }
    memset(q + 4 * (ptrdiff_t)plan->steps, 0, (size_t)(shape->x_stride - 4 * (ptrdiff_t)plan->steps));
    if (shape->corrected) correct_runs(shape, q, correction);
}

// Returns the number of rows that hold an infinity (and no NaN), or an error.
static int64_t prepare(const dt_shape *shape, const dt_args *args, int64_t row, int64_t rows, char *prepared) {
    float *scales = (float *)prepared;
    int32_t *corrections = (int32_t *)(prepared + shape->scale_bytes);
    int8_t *q = (int8_t *)(prepared + shape->scale_bytes + shape->correction_bytes);
    int8_t *plain = malloc((size_t)args->in_features + (size_t)shape->x_stride);
    int64_t infinite_rows = 0;
    if (!plain) return DT_ERROR_MEMORY;
    int8_t *line = plain + args->in_features;
    for (int64_t m = 0; m < rows; m++) {
        const char *x = (const char *)pointer(args->x) + (row + m) * args->x_stride * element_bytes(args->x_dtype);
        quantize_row(shape, x, args->x_dtype, scales + m, corrections + m * shape->plan.run_count,
                     shape->x_rows > 1 ? line : q + m * shape->x_stride, plain, &infinite_rows);
        if (shape->x_rows > 1) put_row(shape, line, m, q);
    }
    const int64_t rest = shape->padded_rows - rows;
    if (shape->corrected) memset(corrections + rows * shape->plan.run_count, 0, (size_t)(rest * shape->plan.run_count) * 4);
    if (shape->x_rows > 1) {
        memset(line, 0, (size_t)shape->x_stride);
        for (int64_t m = rows; m < shape->padded_rows; m++) put_row(shape, line, m, q);
    } else {
        memset(q + rows * shape->x_stride, 0, (size_t)(rest * shape->x_stride));
    }
    free(plain);
    return infinite_rows;
}

static const void *offset(int64_t address, int64_t dtype, int64_t elements) {
    return (const char *)pointer(address) + elements * element_bytes(dtype);
}

// Effective float scales of one panel: [columns][groups] for the GEMV and for one group, else [groups][tile columns].
static void load_scales(const dt_shape *shape, const dt_args *args, int64_t n0, int32_t columns, float *scales, float *rows) {
    const int64_t groups = shape->plan.groups;
    const int32_t tile_columns = shape->variant->tile_columns;
    const uint8_t *multiplier = args->multiplier ? (const uint8_t *)pointer(args->multiplier) + n0 * groups : NULL;
    const void *source = offset(args->scale, args->scale_dtype, multiplier ? n0 : n0 * groups);
    if (shape->folded) {
        shape->variant->scales(source, args->scale_dtype, NULL, columns, 1, scales);
        for (int32_t n = 0; n < columns; n++) scales[n] /= 63.0f;
        return;
    }
    const int as_rows = shape->use_gemv || groups == 1;
    shape->variant->scales(source, args->scale_dtype, multiplier, columns, groups, as_rows ? scales : rows);
    for (int64_t g = 0; !as_rows && g < groups; g++) {
        // columns past the end are computed and dropped, but must hold numbers
        for (int32_t n = 0; n < tile_columns; n++) scales[g * tile_columns + n] = n < columns ? rows[n * groups + g] : 0.0f;
    }
}

typedef struct {
    void *base;
    float *scales;      // as load_scales leaves them
    float *scale_rows;  // [tile columns][groups]
    uint8_t *panel;     // one block of codes
    char *accumulator;  // [padded rows][tile columns]
    uint8_t *row_copy;
    uint8_t *multipliers;  // [groups][tile columns][4]
    int32_t *step_groups;
} dt_scratch;

static int scratch_build(dt_scratch *scratch, const dt_shape *shape) {
    const int64_t columns = shape->variant->tile_columns;
    const int64_t steps = shape->tiled ? shape->x_stride / 4 : shape->use_gemv ? 0 : shape->variant->block_steps;
    const size_t scales = (size_t)round_up(shape->plan.groups * columns * 4, CACHE_LINE);
    const size_t panel = (size_t)(steps * columns * 4);
    const size_t accumulator = shape->tiled ? 0 : (size_t)(shape->padded_rows * columns * 4);
    const size_t row_copy = shape->use_gemv ? (size_t)shape->plan.plane_bytes + 64 : 0;
    const size_t step_groups = shape->folded ? (size_t)round_up(steps * 4, CACHE_LINE) : 0;
    char *memory = aligned_memory(2 * scales + panel + accumulator + step_groups + row_copy, &scratch->base);
    if (!memory) return DT_ERROR_MEMORY;
    scratch->scales = (float *)memory;
    scratch->scale_rows = (float *)(memory + scales);
    scratch->multipliers = (uint8_t *)memory + scales;  // never together with scale_rows
    memory += 2 * scales;
    scratch->panel = (uint8_t *)memory;
    scratch->accumulator = memory + panel;
    scratch->step_groups = (int32_t *)(memory + panel + accumulator);
    scratch->row_copy = (uint8_t *)memory + panel + accumulator + step_groups;
    for (int32_t i = 0; shape->folded && i < shape->plan.segment_count; i++) {
        const dt_segment *segment = &shape->plan.segments[i];
        for (int32_t s = 0; s < segment->steps; s++) scratch->step_groups[segment->step + s] = segment->group;
    }
    return 0;
}

// Each multiplier four times, for the four columns of a step.
static void load_multipliers(const dt_shape *shape, const dt_args *args, int64_t n0, int32_t columns, uint8_t *lines) {
    const int64_t groups = shape->plan.groups;
    const int32_t width = shape->variant->tile_columns;
    const uint8_t *source = (const uint8_t *)pointer(args->multiplier) + n0 * groups;
    for (int32_t n = 0; n < width; n++) {
        const uint8_t *row = source + (n < columns ? n : columns - 1) * groups;
        for (int64_t g = 0; g < groups; g++) {
            const uint32_t four = row[g] * 0x01010101u;
            memcpy(lines + (g * width + n) * 4, &four, 4);
        }
    }
}

static void multiply_panel(const dt_shape *shape, const dt_args *args, const char *prepared, int64_t n0, int32_t columns,
                           const dt_scratch *scratch, const float *group_scale) {
    const dt_variant *v = shape->variant;
    const dt_plan *plan = &shape->plan;
    const uint8_t *weight = pointer(args->weight);
    const int32_t *corrections = (const int32_t *)(prepared + shape->scale_bytes);
    const int8_t *q = (const int8_t *)(prepared + shape->scale_bytes + shape->correction_bytes);
    const uint8_t *weight_end = weight + args->out_features * plan->plane_bytes;
    const uint8_t *panel_weight = weight + n0 * plan->plane_bytes;
    memset(scratch->accumulator, 0, (size_t)(shape->padded_rows * v->tile_columns * 4));
    if (shape->use_gemv) {
        const dt_gemv gemv = {panel_weight, weight_end, plan->plane_bytes, columns, v->tile_columns,
                              (int32_t)shape->padded_rows, q, shape->x_stride, plan->runs, plan->run_count,
                              corrections, plan->run_count, group_scale, plan->groups, scratch->accumulator, scratch->row_copy};
        v->gemv(&gemv);
        return;
    }
    for (int32_t b = 0; b < plan->block_count; b++) {
        const dt_block *block = &plan->blocks[b];
        v->decode(plan, block->step, block->steps, panel_weight, weight_end, columns, v->tile_columns, scratch->panel);
        for (int64_t m = 0; m < shape->padded_rows; m += v->tile_rows) {
            const int64_t rows = shape->padded_rows - m < v->tile_rows ? shape->padded_rows - m : v->tile_rows;
            const dt_tile tile = {scratch->panel,
                                  q + m * shape->x_stride + 4 * (ptrdiff_t)block->step * shape->x_rows,
                                  shape->x_stride,
                                  plan->runs + block->run,
                                  block->runs,
                                  block->step,
                                  corrections + m * plan->run_count + block->run,
                                  plan->run_count,
                                  group_scale,
                                  scratch->accumulator + m * v->tile_columns * 4};
            v->tile(&tile, (int32_t)rows);
        }
    }
}

static dt_panel tiled_panel(const dt_shape *shape, const dt_args *args, const char *prepared, int64_t rows, int64_t n0,
                            int32_t columns, const dt_scratch *scratch) {
    const uint8_t *weight = pointer(args->weight);
    const int64_t plane_bytes = shape->plan.plane_bytes;
    dt_panel panel = {.plan = &shape->plan,
                      .weight = weight + n0 * plane_bytes,
                      .weight_end = weight + args->out_features * plane_bytes,
                      .columns = columns,
                      .x = (const int8_t *)(prepared + shape->scale_bytes),
                      .rows = rows,
                      .row_tiles = shape->x_stride / CACHE_LINE,
                      .panel = scratch->panel};
    if (shape->folded) {
        load_multipliers(shape, args, n0, columns, scratch->multipliers);
        panel.multipliers = scratch->multipliers;
        panel.step_groups = scratch->step_groups;
    }
    return panel;
}

// Output columns [n0, n1) of `rows` quantized rows that start at row `row` of out.
static int apply(const dt_shape *shape, const dt_args *args, const char *prepared, int64_t row, int64_t rows,
                 int64_t n0, int64_t n1) {
    const dt_variant *v = shape->variant;
    dt_scratch scratch;
    if (scratch_build(&scratch, shape)) return DT_ERROR_MEMORY;
    const float *row_scales = (const float *)prepared;
    const int grouped = shape->plan.groups > 1 && !shape->folded;
    if (shape->tiled) v->begin();
    for (int64_t n = n0; n < n1; n += v->tile_columns) {
        const int32_t columns = (int32_t)(n1 - n < v->tile_columns ? n1 - n : v->tile_columns);
        float bias[DT_MAX_TILE_COLUMNS];
        load_scales(shape, args, n, columns, scratch.scales, scratch.scale_rows);
        for (int32_t i = 0; args->bias && i < columns; i++) bias[i] = dt_load(pointer(args->bias), args->bias_dtype, n + i);
        if (shape->tiled) {
            dt_panel panel = tiled_panel(shape, args, prepared, rows, n, columns, &scratch);
            panel.group_scale = grouped ? scratch.scales : NULL;
            panel.column_scale = grouped ? NULL : scratch.scales;
            panel.row_scale = row_scales;
            panel.bias = args->bias ? bias : NULL;
            panel.out = (char *)pointer(args->out) + (row * args->out_stride + n) * element_bytes(args->x_dtype);
            panel.out_stride = args->out_stride;
            panel.dtype = args->x_dtype;
            v->multiply(&panel);
            continue;
        }
        multiply_panel(shape, args, prepared, n, columns, &scratch, grouped ? scratch.scales : NULL);
        for (int64_t m = 0; m < rows; m++) {
            char *out = (char *)pointer(args->out) + ((row + m) * args->out_stride + n) * element_bytes(args->x_dtype);
            v->store(scratch.accumulator + m * v->tile_columns * 4, grouped ? NULL : scratch.scales, row_scales[m],
                     args->bias ? bias : NULL, out, args->x_dtype, columns);
        }
    }
    if (shape->tiled) v->end();
    free(scratch.base);
    return 0;
}

DT_EXPORT int64_t dt_abi_version(void) { return DT_ABI_VERSION; }

// Name of a variant, best first; NULL past the end.
DT_EXPORT const char *dt_variant_name(int64_t index) {
    return index >= 0 && index < VARIANT_COUNT ? VARIANTS[index]->name : NULL;
}

DT_EXPORT int64_t dt_variant_supported(int64_t index) {
    return index >= 0 && index < VARIANT_COUNT && VARIANTS[index]->supported();
}

// Where part `part` of [0, size) begins: parts are of nearly equal length and begin at a multiple of `multiple`.
static int64_t part_edge(int64_t size, int64_t multiple, int64_t parts, int64_t part) {
    const int64_t units = (size + multiple - 1) / multiple;
    const int64_t edge = units * part / parts * multiple;
    return edge < size ? edge : size;
}

// The variant's own check comes with its first block.
static const dt_variant *variant_of(const dt_args *args) {
    return VARIANTS[args->variant >= 0 && args->variant < VARIANT_COUNT ? args->variant : VARIANT_COUNT - 1];
}

// Rows that are quantized together: their int8 copy stays in the second-level cache.
static int64_t block_rows(const dt_args *args) {
    const int64_t bytes = variant_of(args)->block_bytes;
    if (!bytes) return ROW_BLOCK;
    const int64_t rows = bytes / args->in_features / ROW_MULTIPLE * ROW_MULTIPLE;
    return rows < LEAST_ROWS ? LEAST_ROWS : rows > MOST_ROWS ? MOST_ROWS : rows;
}

// Rows [m0, m1) of the whole layer, in blocks; returns the number of infinite rows, or an error.
static int64_t linear_rows(const dt_args *args, int64_t m0, int64_t m1) {
    int64_t infinite_rows = 0;
    const int64_t size = m1 - m0, blocks = (size + block_rows(args) - 1) / block_rows(args);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = m0 + part_edge(size, ROW_MULTIPLE, blocks, b);
        const int64_t rows = m0 + part_edge(size, ROW_MULTIPLE, blocks, b + 1) - row;
        if (!rows) continue;
        dt_shape shape;
        int64_t result = shape_build(&shape, args, rows);
        if (result) return result;
        void *base;
        char *prepared = aligned_memory(prepared_bytes(&shape), &base);
        result = prepared ? prepare(&shape, args, row, rows, prepared) : DT_ERROR_MEMORY;
        if (result >= 0) {
            infinite_rows += result;
            result = apply(&shape, args, prepared, row, rows, 0, args->out_features);
        }
        free(base);
        dt_plan_free(&shape.plan);
        if (result < 0) return result;
    }
    return infinite_rows;
}

// A call cut into parts, of rows or of output columns.
typedef struct {
    const dt_args *args;
    const dt_shape *shape;  // of all rows, for parts of columns
    const char *prepared;
    int64_t size, multiple, parts;
    int64_t first;  // first row of the weight, and where it goes: for parts of the exact path
    void *out;
    int64_t results[MOST_PARTS];
} dt_call;

static void call_cut(dt_call *call, int64_t size, int64_t multiple, int64_t workers) {
    const int64_t units = (size + multiple - 1) / multiple;
    call->size = size;
    call->multiple = multiple;
    call->parts = workers < units ? workers : units;
    if (call->parts > MOST_PARTS) call->parts = MOST_PARTS;
    if (call->parts < 1) call->parts = 1;
}

static int64_t call_edge(const dt_call *call, int64_t part) {
    return part_edge(call->size, call->multiple, call->parts, part);
}

// Sum of the parts' results, or an error among them.
static int64_t call_run(dt_call *call, void (*task)(void *context, int64_t part)) {
    dt_parallel(task, call, call->parts);
    int64_t total = 0;
    for (int64_t i = 0; i < call->parts; i++) {
        if (call->results[i] < 0) return call->results[i];
        total += call->results[i];
    }
    return total;
}

static void linear_part(void *context, int64_t part) {
    dt_call *call = context;
    call->results[part] = linear_rows(call->args, call_edge(call, part), call_edge(call, part + 1));
}

static void apply_part(void *context, int64_t part) {
    dt_call *call = context;
    call->results[part] = apply(call->shape, call->args, call->prepared, 0, call->args->rows, call_edge(call, part),
                                call_edge(call, part + 1));
}

// The whole layer by `workers` threads; returns the number of infinite rows, or an error.
DT_EXPORT int64_t dt_linear(const dt_args *args, int64_t workers) {
    if (workers <= 1) return linear_rows(args, 0, args->rows);
    dt_call call = {.args = args};
    if (args->rows >= workers * ROWS_PER_PART) {
        call_cut(&call, args->rows, ROW_MULTIPLE, workers);
        return call_run(&call, linear_part);
    }
    dt_shape shape;
    int64_t result = shape_build(&shape, args, args->rows);
    if (result) return result;
    void *base;
    char *prepared = aligned_memory(prepared_bytes(&shape), &base);
    result = prepared ? prepare(&shape, args, 0, args->rows, prepared) : DT_ERROR_MEMORY;
    if (result >= 0) {
        call.shape = &shape;
        call.prepared = prepared;
        call_cut(&call, args->out_features, DT_MAX_TILE_COLUMNS, workers);
        const int64_t error = call_run(&call, apply_part);
        if (error < 0) result = error;
    }
    free(base);
    dt_plan_free(&shape.plan);
    return result;
}

// Test hook: int32 sums of int8 x [rows, in_features] times the codes, out [rows, groups, out_features].
// It runs the layer's own tiles (or GEMV) on one group at a time, as if each were a layer with one scale per row.
DT_EXPORT int64_t dt_accumulate(const dt_args *layer, const int8_t *x, int32_t *out) {
    dt_shape shape;
    dt_args bare = *layer;
    const dt_args *args = &bare;
    bare.multiplier = 0;
    int64_t error = shape_build(&shape, args, args->rows);
    if (error) return error;
    const dt_plan *plan = &shape.plan;
    const int32_t width = shape.variant->tile_columns;
    void *base, *sums_base;
    dt_scratch scratch = {0};
    char *prepared = aligned_memory(prepared_bytes(&shape), &base);
    char *sums = aligned_memory((size_t)(shape.padded_rows * width * 4 + shape.x_stride), &sums_base);
    error = prepared && sums ? scratch_build(&scratch, &shape) : DT_ERROR_MEMORY;
    if (!error && shape.tiled) shape.variant->begin();
    for (int64_t g = 0; !error && g < plan->groups; g++) {
        memset(prepared, 0, prepared_bytes(&shape));
        int32_t *corrections = (int32_t *)(prepared + shape.scale_bytes);
        int8_t *q = (int8_t *)(prepared + shape.scale_bytes + shape.correction_bytes);
        for (int64_t m = 0; m < args->rows; m++) {
            int8_t *line = shape.x_rows > 1 ? (int8_t *)sums + shape.padded_rows * width * 4 : q + m * shape.x_stride;
            memset(line, 0, (size_t)shape.x_stride);
            for (int32_t i = 0; i < plan->segment_count; i++) {
                const dt_segment *segment = &plan->segments[i];
                if (segment->group != g) continue;
                memcpy(line + 4 * (ptrdiff_t)segment->step, x + m * args->in_features + segment->column,
                       (size_t)segment->length);
            }
            if (shape.x_rows > 1) put_row(&shape, line, m, q);
            if (shape.corrected) correct_runs(&shape, line, corrections + m * plan->run_count);
        }
        for (int64_t n = 0; n < args->out_features; n += width) {
            const int32_t columns = (int32_t)(args->out_features - n < width ? args->out_features - n : width);
            if (shape.tiled) {
                dt_panel panel = tiled_panel(&shape, args, prepared, args->rows, n, columns, &scratch);
                panel.sums = (int32_t *)sums;
                shape.variant->multiply(&panel);
            } else {
                multiply_panel(&shape, args, prepared, n, columns, &scratch, NULL);
            }
            for (int64_t m = 0; m < args->rows; m++) {
                memcpy(out + (m * plan->groups + g) * args->out_features + n,
                       (shape.tiled ? sums : scratch.accumulator) + m * width * 4, (size_t)columns * 4);
            }
        }
    }
    if (!error && shape.tiled) shape.variant->end();
    free(scratch.base);
    free(sums_base);
    free(base);
    dt_plan_free(&shape.plan);
    return error;
}

// Test hook: int8 rows as the layer quantizes them, without padding, and their scales.
DT_EXPORT int64_t dt_quantize_rows(const dt_args *args, int8_t *q, float *scales) {
    dt_shape shape;
    int64_t error = shape_build(&shape, args, args->rows);
    if (error) return error;
    void *base;
    char *prepared = aligned_memory(prepared_bytes(&shape), &base);
    error = prepared ? prepare(&shape, args, 0, args->rows, prepared) : DT_ERROR_MEMORY;
    int8_t *line = malloc((size_t)shape.x_stride);
    if (!line) error = DT_ERROR_MEMORY;
    for (int64_t m = 0; error >= 0 && m < args->rows; m++) {
        const int8_t *rows = (const int8_t *)(prepared + shape.scale_bytes + shape.correction_bytes);
        const int8_t *row = shape.x_rows > 1 ? line : rows + m * shape.x_stride;
        if (shape.x_rows > 1) get_row(&shape, rows, m, line);
        for (int32_t i = 0; i < shape.plan.segment_count; i++) {
            const dt_segment *segment = &shape.plan.segments[i];
            memcpy(q + m * args->in_features + segment->column, row + 4 * (ptrdiff_t)segment->step, (size_t)segment->length);
        }
        scales[m] = ((const float *)prepared)[m];
    }
    free(line);
    free(base);
    dt_plan_free(&shape.plan);
    return error;
}

// Rows [n0, n1) of the weight as float32 [n1 - n0, in_features].
static int64_t dequantize_rows(const dt_args *args, int64_t n0, int64_t n1, float *out) {
    dt_shape shape;
    const int64_t error = shape_build(&shape, args, args->rows);
    if (error) return error;
    const dt_plan *plan = &shape.plan;
    const uint8_t *multiplier = pointer(args->multiplier);
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *row = (const uint8_t *)pointer(args->weight) + n * plan->plane_bytes;
        float *target = out + (n - n0) * args->in_features;
        for (int32_t i = 0; i < plan->segment_count; i++) {
            const dt_segment *segment = &plan->segments[i];
            const int64_t at = n * plan->groups + segment->group;
            const float scale =
                multiplier ? dt_load(pointer(args->scale), args->scale_dtype, n) * (float)multiplier[at] / 63.0f
                           : dt_load(pointer(args->scale), args->scale_dtype, at);
            shape.variant->expand(row + segment->byte, segment->length, segment->shift, scale, target + segment->column);
        }
    }
    dt_plan_free(&shape.plan);
    return 0;
}

static void dequantize_part(void *context, int64_t part) {
    dt_call *call = context;
    const int64_t first = call_edge(call, part), last = call_edge(call, part + 1);
    call->results[part] = dequantize_rows(call->args, call->first + first, call->first + last,
                                          (float *)call->out + first * call->args->in_features);
}

// Exact path: rows [n0, n1) of the weight as float32 [n1 - n0, in_features], by `workers` threads.
DT_EXPORT int64_t dt_dequantize(const dt_args *args, int64_t n0, int64_t n1, float *out, int64_t workers) {
    dt_call call = {.args = args, .out = out, .first = n0};
    call_cut(&call, n1 - n0, 1, workers);
    return call_run(&call, dequantize_part);
}
