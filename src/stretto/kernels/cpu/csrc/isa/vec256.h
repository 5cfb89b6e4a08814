/* Vectors of 8 lanes: AVX2 with FMA. */
#ifndef STRETTO_VEC256_H
#define STRETTO_VEC256_H

#include "../api.h"

#include <immintrin.h>

#define VF 8
typedef __m256 vf;
typedef __m256i vi;

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
/* The same, in source order: see vi_dot. */
INLINE vf vf_sum(vf a, vf b, vf c)
{
    c = _mm256_fmadd_ps(a, b, c);
    __asm__ volatile("" : "+x"(c));
    return c;
}
INLINE vf vf_from(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vf vf_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE vf vf_i8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vf vf_even(vi pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE vf vf_odd(vi pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000))); }
INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256(p, a); }

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
    vi odd = _mm256_srli_epi16(packed, bits);
    return bits == 4 ? _mm256_and_si256(part ? odd : packed, _mm256_set1_epi8(15))
         : part      ? odd
                     : _mm256_and_si256(packed, _mm256_set1_epi16(255));
}
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    sum = bits == 4 ? _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x))
                    : _mm256_add_epi32(sum, _mm256_madd_epi16(weights, x));
    /* Keeps source order. The compiler would start all products first, and has no registers for them. */
    __asm__ volatile("" : "+x"(sum));
    return sum;
}
INLINE vi vi_total(const int bits, vi sum) { return bits == 4 ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum; }
INLINE int32_t first_sum(int bits, int32_t x_sum)
{
    uint32_t sum = (uint32_t)x_sum;
    return (int32_t)(bits == 4 ? (uint16_t)(-4u * sum) * 0x10001u : -128u * sum);
}

#define NATIVE_I16
INLINE vi vi_bits(vf a) { return _mm256_castps_si256(a); }
INLINE vi vi_dot_i16(vi sum, vi a, vi b)
{
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    __asm__ volatile("" : "+x"(sum));
    return sum;
}
INLINE vf vf_dot_i16(vf sum, vf a, vf b)
{
    return _mm256_castsi256_ps(vi_dot_i16(vi_bits(sum), vi_bits(a), vi_bits(b)));
}
/* Bytes widened to 16 bits: 2 * VF of a row, or VF of each of two rows, interleaved. */
INLINE vi vi_wide(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)); }
INLINE vi vi_side_by_side(const int8_t *p, const int8_t *q)
{
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64((const void *)p), _mm_loadl_epi64((const void *)q)));
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
