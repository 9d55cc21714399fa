// SPDX-License-Identifier: Apache-2.0
// Instruction sets of an x86 processor, from CPUID, and from XCR0 whether the system saves their registers. Not from
// __builtin_cpu_supports: a part of it is in the compiler's runtime library, and that of zig answers no to everything.
#include "ternary.h"

#ifdef DT_X86
#include <cpuid.h>

static int has(uint32_t word, int bit) { return word >> bit & 1; }

static int find_features(void) {
    unsigned a, b, c, d, b7, c7, d7, saved, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 27)) return 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    if ((saved & 0x6) != 0x6 || !has(c, 12) || !has(c, 29) || !has(b7, 5)) return 0;  // FMA, F16C, AVX2
    int features = DT_X86_AVX2;
    const unsigned leaves = a;
    unsigned a71 = 0;
    if (leaves >= 1) __cpuid_count(7, 1, a71, b, c, d);
    if (has(a71, 4)) features |= DT_X86_AVX_VNNI;
    // AVX512F, DQ, BW, VL, VNNI
    if ((saved & 0xe6) != 0xe6 || !has(b7, 16) || !has(b7, 17) || !has(b7, 30) || !has(b7, 31) || !has(c7, 11)) return features;
    features |= DT_X86_AVX512_VNNI;
    // GFNI, AVX512_BF16, AMX-TILE, AMX-INT8
    if ((saved & 0x60000) != 0x60000 || !has(c7, 8) || !has(a71, 5) || !has(d7, 24) || !has(d7, 25)) return features;
    return features | DT_X86_AMX_INT8;
}

int dt_x86_has(int feature) {
    static int known = -1;  // threads that meet here find the same answer
    if (known < 0) known = find_features();
    return (known & feature) != 0;
}
#endif
