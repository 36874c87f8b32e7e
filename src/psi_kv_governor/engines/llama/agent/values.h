// The values of a cached row as floats, for the types of which the keys can be read.

#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Longest head that fits on the stack. The longest known are 576 (latent) and 512.
#define MAX_HEAD 1024

// block_q8_0 of the file format: a scale in f16, then 32 quants.
#define Q8_0_VALUES 32
#define Q8_0_BYTES  34

// Exact for every half but infinities and NaN, of which a key holds none: the exponent is moved by a product,
// which also normalises subnormals.
static inline float half_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t) (half & 0x7fffu) << 13;
    float          value;
    memcpy(&value, &bits, sizeof(value));
    value *= 0x1p112f;
    return half & 0x8000u ? -value : value;
}

static inline void halves_to_floats(const uint16_t * restrict from, float * restrict to, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (from + i))));
    }
#endif
    for (; i < n; i++) {
        to[i] = half_to_float(from[i]);
    }
}

static inline bool values_readable(int32_t type) {
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16 || type == TYPE_Q8_0;
}

// Bytes of `n` values, a multiple of the block for a quantised type.
static inline uint64_t values_bytes(int32_t type, int64_t n) {
    switch (type) {
        case TYPE_F32:  return (uint64_t) n * 4;
        case TYPE_Q8_0: return (uint64_t) n / Q8_0_VALUES * Q8_0_BYTES;
        default:             return (uint64_t) n * 2;
    }
}

static inline void values_read(int32_t type, const uint8_t * restrict from, float * restrict to, int64_t n) {
    if (type == TYPE_F16) {
        halves_to_floats((const uint16_t *) from, to, n);
    } else if (type == TYPE_Q8_0) {
        for (int64_t b = 0; b < n / Q8_0_VALUES; b++, from += Q8_0_BYTES, to += Q8_0_VALUES) {
            uint16_t half;
            memcpy(&half, from, sizeof(half));
            const float    scale  = half_to_float(half);
            const int8_t * quants = (const int8_t *) (from + sizeof(half));
            for (int i = 0; i < Q8_0_VALUES; i++) {
                to[i] = scale * quants[i];
            }
        }
    } else if (type == TYPE_BF16) {
        const uint16_t * halves = (const uint16_t *) from;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t) halves[i] << 16;
            memcpy(to + i, &bits, sizeof(bits));
        }
    } else {
        memcpy(to, from, (size_t) n * sizeof(float));
    }
}

static inline float dot(const float * a, const float * b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

// exp(x) for x <= 0 to a few parts in 10^7, in a form that compilers vectorise: expf would be three quarters
// of the whole cost.
static inline float exp_of(float x) {
    const float    y        = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    const float    whole    = (float) (int32_t) (y - 0.5f);  // rounds to nearest, since y <= 0
    const float    rest     = (y - whole) * 0.69314718f;
    const uint32_t exponent = (uint32_t) ((int32_t) whole + 127) << 23;
    float          power;
    memcpy(&power, &exponent, sizeof(power));
    const float series = 1.0f / 120 + rest * (1.0f / 720);
    return power * (1.0f + rest * (1.0f + rest * (0.5f + rest * (1.0f / 6 + rest * (1.0f / 24 + rest * series)))));
}
