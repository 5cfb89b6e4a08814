/* Vectors of 4 lanes in GCC's vector extensions, for any machine. */
#ifndef STRETTO_VEC128_H
#define STRETTO_VEC128_H

#include "../api.h"

#include <string.h>

#define VF 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));

INLINE vf vf_zero(void) { return (vf){0}; }
INLINE vf vf_set1(float x) { return (vf){x, x, x, x}; }
INLINE vf vf_load(const float *p)
{
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_sum(vf a, vf b, vf c) { return vf_fma(a, b, c); }
INLINE vf vf_from(vi a) { return __builtin_convertvector(a, vf); }
INLINE vi vi_zero(void) { return (vi){0}; }
INLINE vi vi_set1(int32_t x) { return (vi){x, x, x, x}; }
INLINE vi vi_load(const void *p)
{
    vi a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
INLINE vf vf_bf16(const uint16_t *p) { return (vf)((vu){p[0], p[1], p[2], p[3]} << 16); }
INLINE vf vf_i8(const int8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }
INLINE vf vf_even(vi pairs) { return (vf)((vu)pairs << 16); }
INLINE vf vf_odd(vi pairs) { return (vf)((vu)pairs & 0xffff0000u); }

/* Products of quantised weights of `bits` bits, unsigned, with quantised x. See gemm.h. */
#define PARTS(bits) (8 / (bits))
#define X_BITS(bits) 8
#define EXACT_K(bits) MAX_K
INLINE vi vi_split(const int bits, vi packed, int part)
{
    return bits == 8 ? packed : (vi)((vu)packed >> (bits * part)) & (0x01010101 * ((1 << bits) - 1));
}
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    (void)bits;
    for (int shift = 0; shift < 32; shift += 8)
        sum += ((vi)((vu)weights >> shift) & 255) * ((vi)((vu)x << (24 - shift)) >> 24);
    return sum;
}
INLINE vi vi_total(const int bits, vi sum)
{
    (void)bits;
    return sum;
}
INLINE int32_t first_sum(int bits, int32_t x_sum) { return (int32_t)(-(1u << (bits - 1)) * (uint32_t)x_sum); }

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf vf_sums(const vf *a)
{
    vf sums;
    for (int i = 0; i < 4; i++)
        sums[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
    return sums;
}

#define ROWS_INT 2
#define ROWS_FLOAT 2
#define ROWS_WIDE 0 /* up to so many rows of x, registers remain for four vectors of weights */
#define LANES 2 /* queries that share one pass over keys or values */

#endif
