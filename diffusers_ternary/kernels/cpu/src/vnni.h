// SPDX-License-Identifier: Apache-2.0
// The tile of both VNNI variants: whole tiles by full_run, the rest SHORT_ROWS rows at a time by short_run. Each includes
// it once, behind its TARGET, TILE_ROWS, SHORT_ROWS, TILE_COLUMNS and the two functions.
TARGET static void tile(const dt_tile *t, int32_t rows) {
    for (int32_t i = 0; i < t->run_count; i++) {
        const dt_run *run = &t->runs[i];
        const float *scale = dt_run_scale(t, run, TILE_COLUMNS);
        int32_t corrections[TILE_ROWS];
        for (int32_t m = 0; m < rows; m++) corrections[m] = t->correction[m * t->correction_stride + i];
        if (rows == TILE_ROWS) {
            full_run(t, run, corrections, scale);
            continue;
        }
        for (int32_t m = 0; m < rows; m += SHORT_ROWS) {
            dt_tile part = *t;
            part.x += m * t->x_stride;
            part.c = (float *)t->c + m * TILE_COLUMNS;
            short_run(&part, run, corrections + m, scale);
        }
    }
}
