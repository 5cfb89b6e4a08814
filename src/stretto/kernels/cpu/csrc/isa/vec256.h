/* Vectors of 8 lanes: AVX2 with FMA. */
#ifndef STRETTO_VEC256_H
#define STRETTO_VEC256_H

#include <immintrin.h>

#define VF 8
#define HAS_I16 1
#define HAS_BF16 0
#include "lanes.h"

INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_bf16(const uint16_t *p)
{
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
}
INLINE vf vf_i8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }

/* Products of quantised weights of `bits` bits, unsigned, with quantised x. See gemm.h.
 *
 * The sum of two products of full bytes can exceed 16 bits, so 8-bit weights are split into even and odd bytes,
 * widened to 16 bits and multiplied with 16-bit x. Products of 4-bit weights stay bytes, and 32 of k are summed in two
 * 16-bit halves of a lane, each of which starts with half of the offset. No such sum exceeds 15 * 127 * 16 = 30,480. */
#define PARTS(bits) 2
#define X_BITS(bits) ((bits) == 8 ? 16 : 8)
#define EXACT_K(bits) ((bits) == 8 ? MAX_K : 32)
INLINE vi vi_split(const int bits, vi packed, int part)
{
    __m256i words = (__m256i)packed, odd = _mm256_srli_epi16(words, bits);
    return (vi)(bits == 4 ? _mm256_and_si256(part ? odd : words, _mm256_set1_epi8(15))
                : part    ? odd
                          : _mm256_and_si256(words, _mm256_set1_epi16(255)));
}
/* Keeps source order. The compiler would start all products first, and has no registers for them. */
#define IN_ORDER(sum) __asm__ volatile("" : "+x"(sum))
INLINE vf vf_sum(vf a, vf b, vf c)
{
    c = vf_fma(a, b, c);
    IN_ORDER(c);
    return c;
}
INLINE vi vi_dot_i16(vi sum, vi a, vi b)
{
    sum = vi_add(sum, (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b));
    IN_ORDER(sum);
    return sum;
}
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    if (bits != 4)
        return vi_dot_i16(sum, weights, x);
    sum = (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)weights, (__m256i)x));
    IN_ORDER(sum);
    return sum;
}
INLINE vi vi_total(const int bits, vi sum)
{
    return bits == 4 ? (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)) : sum;
}
INLINE int32_t first_sum(int bits, int32_t x_sum)
{
    uint32_t sum = (uint32_t)x_sum;
    return (int32_t)(bits == 4 ? (uint16_t)(-4u * sum) * 0x10001u : -128u * sum);
}

/* Bytes widened to 16 bits: 2 * VF of a row, or VF of each of two rows, interleaved. */
INLINE vi vi_wide(const int8_t *p) { return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)); }
INLINE vi vi_side_by_side(const int8_t *p, const int8_t *q)
{
    __m128i first = _mm_loadl_epi64((const void *)p), second = _mm_loadl_epi64((const void *)q);
    return (vi)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
}

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf vf_sums(const vf *a)
{
    vf low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    vf high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return vf_add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

#define ROWS_INT 6
#define ROWS_FLOAT 4
#define ROWS_WIDE 2 /* up to so many rows of x, registers remain for four vectors of weights */
#define LANES 2 /* queries that share one pass over keys or values */

#endif
