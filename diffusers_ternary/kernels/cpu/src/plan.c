// SPDX-License-Identifier: Apache-2.0
// Cuts the K axis into segments (one plane, one group), runs and cache blocks.
#include <stdlib.h>

#include "ternary.h"

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void add_segments(dt_plan *plan, int64_t group_size, dt_plan_options options) {
    int32_t step = 0;
    int64_t last_group = 0;
    plan->natural = 1;
    for (int64_t column = 0; column < plan->in_features;) {
        const int64_t plane = column / plan->plane_bytes;
        const int64_t group = column / group_size;
        const int64_t end = least(least((plane + 1) * plan->plane_bytes, (group + 1) * group_size), plan->in_features);
        const int64_t padded = (end - column + options.align - 1) / options.align * options.align;
        if (group != last_group && !options.fold) step = (step + options.group_steps - 1) / options.group_steps * options.group_steps;
        last_group = group;
        dt_segment *segment = &plan->segments[plan->segment_count++];
        segment->column = (int32_t)column;
        segment->length = (int32_t)(end - column);
        segment->byte = (int32_t)(column - plane * plan->plane_bytes);
        segment->shift = (int32_t)(6 - 2 * plane);
        segment->step = step;
        segment->steps = (int32_t)(padded / 4);
        segment->group = (int32_t)group;
        plan->natural &= 4 * (int64_t)step == column && segment->length == 4 * segment->steps;
        step += segment->steps;
        column = end;
    }
    plan->steps = step;
    plan->natural &= step == plan->plane_bytes;
}

static void add_runs(dt_plan *plan, dt_plan_options options) {
    for (int32_t i = 0; i < plan->segment_count; i++) {
        const dt_segment *segment = &plan->segments[i];
        for (int32_t done = 0; done < segment->steps;) {
            dt_run *run = plan->run_count ? &plan->runs[plan->run_count - 1] : NULL;
            const int joins = options.merge && run && (run->group == segment->group || options.fold) && run->steps < options.run_steps;
            if (!joins) {
                run = &plan->runs[plan->run_count++];
                run->step = segment->step + done;
                run->steps = 0;
                run->group = segment->group;
                run->byte = segment->byte + 4 * done;
                run->shift = segment->shift;
            }
            const int32_t taken = (int32_t)least(options.run_steps - run->steps, segment->steps - done);
            run->steps += taken;
            done += taken;
        }
    }
}

static void add_blocks(dt_plan *plan, dt_plan_options options) {
    const int32_t wanted = (plan->steps + options.block_steps - 1) / options.block_steps;
    const int32_t even = (plan->steps + wanted - 1) / wanted;  // blocks of equal length, no short rest
    for (int32_t i = 0; i < plan->run_count; i++) {
        const dt_run *run = &plan->runs[i];
        dt_block *block = plan->block_count ? &plan->blocks[plan->block_count - 1] : NULL;
        if (!block || block->steps >= even || run->step + run->steps - block->step > options.block_steps) {
            block = &plan->blocks[plan->block_count++];
            block->step = run->step;
            block->steps = 0;
            block->run = i;
            block->runs = 0;
        }
        block->steps = run->step + run->steps - block->step;  // with the gaps between groups
        block->runs++;
    }
}

int dt_plan_build(dt_plan *plan, int64_t in_features, int64_t group_size, dt_plan_options options) {
    if (group_size > in_features) group_size = in_features;
    plan->in_features = in_features;
    plan->plane_bytes = (in_features + 3) / 4;
    plan->groups = (in_features + group_size - 1) / group_size;
    plan->segment_count = plan->run_count = plan->block_count = plan->steps = 0;
    plan->segments = NULL;
    const int64_t most_segments = plan->groups + 4;
    const int64_t most_steps = (in_features + most_segments * options.align) / 4 + plan->groups * options.group_steps + 1;
    const int64_t most_runs = most_segments + most_steps / options.run_steps + 1;
    const size_t bytes = (size_t)most_segments * sizeof(dt_segment) + (size_t)most_runs * (sizeof(dt_run) + sizeof(dt_block));
    char *memory = malloc(bytes);
    if (!memory) return DT_ERROR_MEMORY;
    plan->segments = (dt_segment *)memory;
    plan->runs = (dt_run *)(memory + (size_t)most_segments * sizeof(dt_segment));
    plan->blocks = (dt_block *)(memory + (size_t)most_segments * sizeof(dt_segment) + (size_t)most_runs * sizeof(dt_run));
    add_segments(plan, group_size, options);
    add_runs(plan, options);
    add_blocks(plan, options);
    return 0;
}

void dt_plan_free(dt_plan *plan) {
    free(plan->segments);
    plan->segments = NULL;
}
