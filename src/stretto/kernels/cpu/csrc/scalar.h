/* Scalar functions and loops over rows, written so that the compiler vectorises them. */
#ifndef STRETTO_SCALAR_H
#define STRETTO_SCALAR_H

#include "api.h"
#include "isa/vector.h"

#include <math.h>
#include <string.h>

#define NV (PANEL / VF)
#define MAX_ROWS (ROWS_INT > ROWS_FLOAT ? ROWS_INT : ROWS_FLOAT)
#define UNROLL _Pragma("GCC unroll 16")
/* Nothing calls the products that an instruction set does not have. */
#if !HAS_BF16
#define vf_dot_pairs(sum, a, b) ((void)(a), (void)(b), (sum))
#endif
#if !HAS_I16
#define vi_dot_i16(sum, a, b) ((void)(a), (void)(b), (sum))
#define vi_wide(p) ((void)(p), vi_zero())
#define vi_side_by_side(p, q) ((void)(p), (void)(q), vi_zero())
#endif
#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer */

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

INLINE uint16_t to_bf16(float x)
{
    uint32_t bits = bits_of(x);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest);
}

/* e^x, to about 2 units in the last place (Cephes' polynomial). 0 below -87, infinity above 88.7, NaN for NaN. */
INLINE float exp_of(float x)
{
    float y = x * 1.44269504f;
    y = y > 128.0f ? 128.0f : y;
    y = y < -126.0f ? -126.0f : y;
    float n = (y + ROUND) - ROUND;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* n may be 128, and 2^128 is not a float: multiply by half of the power twice. */
    int32_t whole = (int32_t)n, half = whole >> 1;
    float result = p * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(whole - half + 127) << 23);
    result = x < -87.0f ? 0.0f : result;
    result = x > 88.8f ? float_of(0x7f800000) : result;
    return x != x ? x : result;
}

/* The same with fewer operations, for the x <= 0 of a softmax. */
INLINE float exp_below(float x)
{
    float y = x < -87.0f ? -87.0f : x;
    float n = (y * 1.44269504f + ROUND) - ROUND;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= float_of((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p;
}

INLINE float tanh_of(float x)
{
    float e = exp_of(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

/* Abramowitz and Stegun, 7.1.26: the error is below 1.5e-7. */
INLINE float erf_of(float x)
{
    float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return copysignf(1.0f - p * exp_of(-a * a), x);
}

INLINE void widen(float *restrict y, const void *x, int64_t n, int64_t type)
{
    if (type == F32) {
        memcpy(y, x, (size_t)n * sizeof(float));
        return;
    }
    const uint16_t *from = x;
    for (int64_t i = 0; i < n; i++)
        y[i] = from_bf16(from[i]);
}

INLINE void narrow(void *y, const float *restrict x, int64_t n, int64_t type)
{
    if (type == F32) {
        memcpy(y, x, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *restrict to = y;
    for (int64_t i = 0; i < n; i++)
        to[i] = to_bf16(x[i]);
}

INLINE void *at(const void *p, int64_t i, int64_t type) { return (char *)p + i * (int64_t)type_size(type); }

/* The bits of the largest magnitude. With a NaN they are greater than those of infinity. */
INLINE uint32_t largest(const float *x, int64_t n)
{
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

/* Quantises x [n] to integers q of magnitude `max` at most. Returns their scale: 0 where all of x is (nearly) 0, NaN
 * where a number is not finite, and then all q are 0. */
INLINE float quantise(int16_t *restrict q, const float *restrict x, int64_t n, float max)
{
    float peak = float_of(largest(x, n));
    if (!(peak > 1e-30f && peak < INFINITY)) {
        memset(q, 0, (size_t)n * sizeof *q);
        return peak < INFINITY ? 0.0f : NAN;
    }
    float inverse = max / peak;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        q[i] = (int16_t)(int32_t)((x[i] * inverse + ROUND) - ROUND);
    return peak / max;
}

INLINE void narrow_q8(int8_t *restrict y, const int16_t *restrict q, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = (int8_t)q[i];
}

INLINE float kv_scale(const void *row, int64_t d)
{
    float scale;
    memcpy(&scale, (const char *)row + d, sizeof scale);
    return scale;
}

/* A key or value as floats, and back. */
INLINE void widen_kv(float *restrict y, const void *row, int64_t d, int64_t type)
{
    if (type != I8) {
        widen(y, row, d, type);
        return;
    }
    const int8_t *q = row;
    float scale = kv_scale(row, d);
    for (int64_t i = 0; i < d; i++)
        y[i] = scale * (float)q[i];
}

INLINE void narrow_kv(void *row, const float *restrict x, int64_t d, int64_t type)
{
    if (type != I8) {
        narrow(row, x, d, type);
        return;
    }
    int16_t q[d];
    float scale = quantise(q, x, d, 127.0f);
    narrow_q8(row, q, d);
    memcpy((char *)row + d, &scale, sizeof scale);
}

#endif
