/* Vectors of 4 lanes in GCC's vector extensions, for any machine. */
#ifndef STRETTO_VEC128_H
#define STRETTO_VEC128_H

#define VF 4
#define HAS_I16 0
#define HAS_BF16 0
#include "sums32.h"

INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_sum(vf a, vf b, vf c) { return vf_fma(a, b, c); }
INLINE vf vf_bf16(const uint16_t *p) { return (vf)((vu){p[0], p[1], p[2], p[3]} << 16); }
INLINE vf vf_i8(const int8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    (void)bits;
    for (int shift = 0; shift < 32; shift += 8)
        sum = vi_add(sum, ((vi)((vu)weights >> shift) & 255) * ((vi)((vu)x << (24 - shift)) >> 24));
    return sum;
}

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
