// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between float, bfloat16 and float16, bit for bit as IEEE 754 and PyTorch do them.
#ifndef DIFFUSERS_TERNARY_CONVERT_H
#define DIFFUSERS_TERNARY_CONVERT_H

#include <string.h>

#include "ternary.h"

static inline uint32_t dt_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float dt_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float dt_from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu;
    const uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return dt_float(sign | 0x7f800000u | (mantissa << 13));
    // a subnormal half is mantissa * 2^-24, a normal float
    if (exponent == 0) return dt_float(sign | dt_bits((float)mantissa * 0x1p-24f));
    return dt_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

static inline uint16_t dt_to_half(float value) {
    const uint32_t bits = dt_bits(value);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {
        // adding 0.5 leaves the subnormal half, rounded to even, in the low mantissa bits
        return (uint16_t)(sign | (uint16_t)(dt_bits(dt_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

static inline uint16_t dt_to_bfloat16(float value) {
    const uint32_t bits = dt_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float dt_load(const void *source, int64_t dtype, int64_t index) {
    if (dtype == DT_FLOAT32) return ((const float *)source)[index];
    const uint16_t half = ((const uint16_t *)source)[index];
    return dtype == DT_BFLOAT16 ? dt_float((uint32_t)half << 16) : dt_from_half(half);
}

static inline void dt_store(void *target, int64_t dtype, int64_t index, float value) {
    if (dtype == DT_FLOAT32) {
        ((float *)target)[index] = value;
    } else {
        ((uint16_t *)target)[index] = dtype == DT_BFLOAT16 ? dt_to_bfloat16(value) : dt_to_half(value);
    }
}

#endif
