// SPDX-License-Identifier: Apache-2.0
// Shared types of the CPU kernels: packed ternary weights times int8 activations (W1.58A8).
//
// A K-plane row holds columns [j*KP, (j+1)*KP) in bits (7-2j, 6-2j) of its KP bytes. K is cut where a plane
// or a scale group ends; inside such a segment four consecutive columns are four consecutive bytes at one
// bit position, so a block of rows becomes a panel by a 32-bit transpose, a shift and a mask.
//
// Panels hold the unsigned code u = t + 1 in {0, 1, 2} because x86 multiplies unsigned by signed bytes;
// the surplus sum(x) of each run is taken off again as an integer, so the accumulators stay exact. Where signed bytes
// are multiplied (AMX, NEON), panels hold t.
#ifndef DIFFUSERS_TERNARY_H
#define DIFFUSERS_TERNARY_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DT_EXPORT __declspec(dllexport)
#else
#define DT_EXPORT __attribute__((visibility("default")))
#endif

#define DT_ABI_VERSION 4
#define DT_MAX_TILE_COLUMNS 32

enum { DT_FLOAT32 = 0, DT_BFLOAT16 = 1, DT_FLOAT16 = 2 };
enum { DT_ERROR_MEMORY = -1, DT_ERROR_VARIANT = -2 };

// All members are int64 (pointers included) so that the caller can pack them without alignment rules.
typedef struct {
    int64_t variant;       // index given by dt_variant_index
    int64_t x;             // [rows, in_features], last stride 1
    int64_t x_stride;      // elements between rows
    int64_t x_dtype;       // also the dtype of out
    int64_t weight;        // int8 [out_features, ceil(in_features / 4)], contiguous
    int64_t scale;         // [out_features, groups], or [out_features, 1] with a multiplier
    int64_t scale_dtype;
    int64_t multiplier;    // uint8 [out_features, groups] or 0
    int64_t bias;          // [out_features] or 0
    int64_t bias_dtype;
    int64_t out;           // [rows, out_features], last stride 1
    int64_t out_stride;
    int64_t rows, out_features, in_features, group_size;
} dt_args;

// Columns [first column, + length) of one plane and one group, at `step` (of four columns) of the padded K axis.
typedef struct {
    int32_t column, length, byte, shift, step, steps, group;
} dt_segment;

// Steps that are summed in integers before the sum is used once.
typedef struct {
    int32_t step, steps, group, byte, shift;
} dt_run;

// Runs whose panel slice stays in the first-level cache.
typedef struct {
    int32_t step, steps, run, runs;
} dt_block;

typedef struct {
    int64_t in_features, plane_bytes, groups;
    int32_t segment_count, run_count, block_count, steps;
    int32_t natural;  // 1: step s is columns 4s .. 4s + 3, nothing is padded
    dt_segment *segments;
    dt_run *runs;
    dt_block *blocks;
} dt_plan;

typedef struct {
    int32_t align;        // columns to which each segment is padded: 4 for tiles, a vector for the GEMV
    int32_t run_steps;    // longest run
    int32_t block_steps;  // longest block
    int32_t merge;        // 1: a run may span segments of one group (tiles), 0: never (GEMV)
    int32_t fold;         // 1: a run may span groups: their multipliers are in the codes
    int32_t group_steps;  // a run of the next group begins at a multiple of these
} dt_plan_options;

int dt_plan_build(dt_plan *plan, int64_t in_features, int64_t group_size, dt_plan_options options);
void dt_plan_free(dt_plan *plan);

// One micro-tile: rows x columns outputs over the runs of one block.
typedef struct {
    const uint8_t *panel;   // [steps][columns][4] codes u
    const int8_t *x;        // first row, at the block's first step
    ptrdiff_t x_stride;
    const dt_run *runs;
    int32_t run_count, step;       // step: the block's first step
    const int32_t *correction;     // per [row][run], at the block's first run; unused with signed codes
    ptrdiff_t correction_stride;
    const float *group_scale;      // [groups][columns], or NULL: c is int32 and unscaled
    void *c;                       // [rows][columns] int32 or float, added to
} dt_tile;

// Where a run begins in the panel and in the first row of x, and the scales of its group.
static inline const uint8_t *dt_run_panel(const dt_tile *t, const dt_run *run, int32_t tile_columns) {
    return t->panel + (ptrdiff_t)(run->step - t->step) * tile_columns * 4;
}
static inline const int8_t *dt_run_x(const dt_tile *t, const dt_run *run) {
    return t->x + 4 * (ptrdiff_t)(run->step - t->step);
}
static inline const float *dt_run_scale(const dt_tile *t, const dt_run *run, int32_t tile_columns) {
    return t->group_scale ? t->group_scale + (ptrdiff_t)run->group * tile_columns : NULL;
}

// A few rows of x times the columns of one panel, straight from the packed bytes.
typedef struct {
    const uint8_t *weight;  // first row
    const uint8_t *weight_end;
    int64_t plane_bytes;
    int32_t columns, tile_columns, rows;
    const int8_t *x;
    ptrdiff_t x_stride;
    const dt_run *runs;
    int32_t run_count;
    const int32_t *correction;  // -sum(x) per [row][run]
    ptrdiff_t correction_stride;
    const float *group_scale;  // [columns][groups], or NULL: c is int32 and unscaled
    int64_t groups;
    void *c;
    uint8_t *row_copy;      // plane_bytes + 64 bytes, for rows too close to the end of the weight
} dt_gemv;

// All rows times one panel, for variants whose tiles go through the whole of K before anything is stored.
typedef struct {
    const dt_plan *plan;
    const uint8_t *weight;  // first row
    const uint8_t *weight_end;
    int32_t columns;
    const int8_t *x;        // tiles [16 rows][64 columns], row_tiles of them beside each other
    int64_t rows, row_tiles;
    uint8_t *panel;         // room for the codes: [steps][columns][4]
    const uint8_t *multipliers;  // [groups][columns][4], each multiplier four times, or NULL
    const int32_t *step_groups;  // group of each step
    const float *group_scale;    // [groups][columns], or NULL: column_scale
    const float *column_scale, *row_scale, *bias;
    void *out;              // [rows][out_stride], at the panel's first column
    int64_t out_stride, dtype;
    int32_t *sums;          // [rows][columns]: the bare integers instead of `out`, or NULL
} dt_panel;

typedef struct {
    const char *name;
    int (*supported)(void);
    int32_t tile_rows, row_multiple, tile_columns, run_steps, block_steps, gemv_align, gemv_run_steps, gemv_max_rows;
    int32_t group_steps;  // 0 stands for 1
    int32_t block_bytes;  // int8 bytes of the rows that are multiplied together, 0 for a fixed number of rows
    // Tiles want x_rows rows of x beside each other, x_bytes of each in turn; 0: one row after the other.
    int32_t x_rows, x_bytes;
    // Largest magnitude of a row as float bits: > 0x7f800000 NaN, == 0x7f800000 infinite.
    uint32_t (*absmax)(const void *x, int64_t dtype, int64_t n);
    // q = round_half_even((x * prescale) * inverse)
    void (*quantize)(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q);
    int32_t (*sum)(const int8_t *q, int64_t n);
    // Start of an accumulator of `tile` that takes the surplus sum(x) of a run off; n is a multiple of 4. This and `sum`
    // are NULL where panels hold signed codes.
    int32_t (*correction)(const int8_t *q, int64_t n);
    void (*decode)(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                   int32_t columns, int32_t tile_columns, uint8_t *panel);
    void (*tile)(const dt_tile *tile, int32_t rows);
    void (*gemv)(const dt_gemv *gemv);
    // Instead of correction, decode and tile. begin and end enclose the panels of
    // a call on one thread.
    void (*multiply)(const dt_panel *panel);
    void (*begin)(void);
    void (*end)(void);
    // Effective float scales [rows][groups] of consecutive weight rows.
    void (*scales)(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out);
    // Codes of n packed bytes at one bit position, times a scale, as float.
    void (*expand)(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out);
    // out = (c * column_scale) * row_scale + bias; c is int32 when column_scale is given, else float
    void (*store)(const void *c, const float *column_scale, float row_scale, const float *bias, void *out,
                  int64_t dtype, int32_t columns);
} dt_variant;

extern const dt_variant dt_scalar;
#if defined(__x86_64__) && defined(__GNUC__)
#define DT_X86 1
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DT_AMX 1
extern const dt_variant dt_amx_int8;
#endif
enum { DT_X86_AVX2 = 1, DT_X86_AVX_VNNI = 2, DT_X86_AVX512_VNNI = 4, DT_X86_AMX_INT8 = 8 };
int dt_x86_has(int feature);
extern const dt_variant dt_avx2;
extern const dt_variant dt_avx_vnni;
extern const dt_variant dt_avx512_vnni;
void dt_gemv_avx512(const dt_gemv *g);
uint32_t dt_absmax_avx512(const void *x, int64_t dtype, int64_t n);
void dt_quantize_avx512(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q);
uint32_t dt_absmax_avx2(const void *x, int64_t dtype, int64_t n);
void dt_quantize_avx2(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q);
int32_t dt_sum_avx2(const int8_t *q, int64_t n);
int32_t dt_correction_vnni(const int8_t *q, int64_t n);
void dt_decode_avx2(const dt_plan *plan, int32_t step, int32_t steps, const uint8_t *weight, const uint8_t *weight_end,
                    int32_t columns, int32_t tile_columns, uint8_t *panel);
void dt_gemv_avx2(const dt_gemv *g);
void dt_scales_avx2(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out);
void dt_expand_avx2(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out);
void dt_store_avx2(const void *c, const float *column_scale, float row_scale, const float *bias, void *out,
                   int64_t dtype, int32_t columns);
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define DT_NEON 1
extern const dt_variant dt_neon_i8mm;
extern const dt_variant dt_neon_dotprod;
#endif

uint32_t dt_absmax_scalar(const void *x, int64_t dtype, int64_t n);
void dt_quantize_scalar(const void *x, int64_t dtype, int64_t n, float prescale, float inverse, int8_t *q);
int32_t dt_sum_scalar(const int8_t *q, int64_t n);
int32_t dt_correction_scalar(const int8_t *q, int64_t n);
void dt_expand_scalar(const uint8_t *bytes, int64_t n, int32_t shift, float scale, float *out);
void dt_store_scalar(const void *c, const float *column_scale, float row_scale, const float *bias, void *out,
                     int64_t dtype, int32_t columns);
void dt_scales_scalar(const void *scale, int64_t dtype, const uint8_t *multiplier, int64_t rows, int64_t groups, float *out);
// Runs task(context, part) for every part of [0, parts), in the calling thread and in others; returns when all are done.
void dt_parallel(void (*task)(void *context, int64_t part), void *context, int64_t parts);
// Bytes of one row from `source`, copied to `copy` when a read of `length` bytes would pass `end`.
const uint8_t *dt_readable(const uint8_t *source, const uint8_t *end, size_t length, uint8_t *copy);

#endif
