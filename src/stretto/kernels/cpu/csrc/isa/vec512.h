/* Vectors of 16 lanes: AVX-512 with VNNI. */
#ifndef STRETTO_VEC512_H
#define STRETTO_VEC512_H

#include <immintrin.h>

#define VF 16
#define HAS_I16 1
#ifndef HAS_BF16
#define HAS_BF16 0
#endif
#include "sums32.h"

#include <string.h>

INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_sum(vf a, vf b, vf c) { return vf_fma(a, b, c); }
INLINE vf vf_bf16(const uint16_t *p)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
INLINE vf vf_i8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    (void)bits;
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}

INLINE vi vi_dot_i16(vi sum, vi a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
/* Bytes widened to 16 bits: 2 * VF of a row, or VF of each of two rows, interleaved. */
INLINE vi vi_wide(const int8_t *p) { return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p)); }
INLINE vi vi_side_by_side(const int8_t *p, const int8_t *q)
{
    __m128i first = _mm_loadu_si128((const void *)p), second = _mm_loadu_si128((const void *)q);
    __m128i low = _mm_unpacklo_epi8(first, second), high = _mm_unpackhi_epi8(first, second);
    return (vi)_mm512_cvtepi8_epi16(_mm256_set_m128i(high, low));
}

/* A step of the sums of lanes: pairs of neighbours, pairs of those, and then quarters of the vector. */
INLINE vf vf_fold(vf a, vf b, int step)
{
    if (step == 0)
        return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    if (step == 1)
        return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b) + (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf vf_sums(const vf *a)
{
    vf sums[VF];
    memcpy(sums, a, sizeof sums);
    for (int step = 0; step < 4; step++)
        for (int i = 0; i < VF >> (step + 1); i++)
            sums[i] = vf_fold(sums[2 * i], sums[2 * i + 1], step);
    return sums[0];
}

#define ROWS_INT 8
#define ROWS_FLOAT 8
#define ROWS_WIDE 0 /* up to so many rows of x, registers remain for four vectors of weights */
#define LANES 4 /* queries that share one pass over keys or values */
#if HAS_BF16
INLINE vf vf_dot_pairs(vf sum, vf a, vf b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

#endif
