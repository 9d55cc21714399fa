// SPDX-License-Identifier: Apache-2.0
// Between base-3 codes (files: five trits a byte, one row-major stream) and 2-bit K-planes (memory).
#include <stdlib.h>
#include <string.h>

#include "ternary.h"

#define TRITS 5
#define TABLE_WIDTH 8  // codes are stored eight at a time, of which three are overwritten by the next byte's

static void decode_table(uint8_t table[256][TABLE_WIDTH]) {
    static const uint8_t code[3] = {3, 0, 1};  // digit 0 is -1, as two's complement in two bits
    memset(table, 0, 256 * TABLE_WIDTH);
    for (int byte = 0; byte < 243; byte++) {
        int rest = byte;
        for (int j = 0; j < TRITS; j++, rest /= 3) table[byte][j] = code[rest % 3];
    }
}

// Rows [row0, row1) of `packed` into `planes` [rows, ceil(in_features / 4)]. Bytes of 243 and more read as zeros.
DT_EXPORT int64_t dt_base3_to_planes(const uint8_t *packed, int64_t row0, int64_t row1, int64_t in_features,
                                     uint8_t *planes) {
    const int64_t width = (in_features + 3) / 4;
    uint8_t table[256][TABLE_WIDTH];
    uint8_t *codes = malloc((size_t)(4 * width + TRITS + TABLE_WIDTH));
    if (!codes) return DT_ERROR_MEMORY;
    decode_table(table);
    for (int64_t row = row0; row < row1; row++) {
        const int64_t first = row * in_features / TRITS;
        const int64_t last = ((row + 1) * in_features + TRITS - 1) / TRITS;
        for (int64_t i = first; i < last; i++) memcpy(codes + TRITS * (i - first), table[packed[i]], TABLE_WIDTH);
        const uint8_t *start = codes + (row * in_features - TRITS * first);
        memset(codes + (start - codes) + in_features, 0, (size_t)(4 * width - in_features));
        uint8_t *restrict out = planes + row * width;
        for (int64_t c = 0; c < width; c++)
            out[c] = (uint8_t)(start[c] << 6 | start[c + width] << 4 | start[c + 2 * width] << 2 | start[c + 3 * width]);
    }
    free(codes);
    return 0;
}

// Inverse: `planes` into the base-3 bytes of rows [row0, row1). Rows from a multiple of five on start at a whole byte;
// `row1` is another one, or the last row, whose last byte is filled up with codes of 0.
DT_EXPORT int64_t dt_planes_to_base3(const uint8_t *planes, int64_t row0, int64_t row1, int64_t in_features,
                                     uint8_t *packed) {
    const int64_t width = (in_features + 3) / 4;
    int64_t pending = 0;
    uint8_t *digits = malloc((size_t)(4 * width + 2 * TRITS));
    if (!digits) return DT_ERROR_MEMORY;
    uint8_t *out = packed + row0 * in_features / TRITS;
    for (int64_t row = row0; row < row1; row++) {
        const uint8_t *bytes = planes + row * width;
        for (int plane = 0; plane < 4; plane++) {
            uint8_t *restrict target = digits + pending + plane * width;
            for (int64_t c = 0; c < width; c++) target[c] = (uint8_t)(((bytes[c] >> (6 - 2 * plane)) + 1) & 3);
        }
        const int64_t total = pending + in_features;
        const uint8_t *d = digits;
        for (; d + TRITS <= digits + total; d += TRITS)
            *out++ = (uint8_t)(d[0] + 3 * d[1] + 9 * d[2] + 27 * d[3] + 81 * d[4]);
        pending = digits + total - d;
        memmove(digits, d, (size_t)pending);
    }
    if (pending) {
        memset(digits + pending, 1, (size_t)(TRITS - pending));
        *out = (uint8_t)(digits[0] + 3 * digits[1] + 9 * digits[2] + 27 * digits[3] + 81 * digits[4]);
    }
    free(digits);
    return 0;
}
