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
/* The same in this order, as vi_dot. */
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
INLINE vf vf_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vf vf_even(vi pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE vf vf_odd(vi pairs)
{
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}
INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256(p, a); }

/* Products of full-range bytes would saturate in 16 bits, so int8 is split into even and odd bytes of 16 bits each.
 * Those of nibbles do not: 32 of k are summed in 16 bits, two sums to a lane, each of which takes back half of the
 * offset. By case analysis they stay within 15 * 127 * 16 = 30,480. */
#define PARTS_I8 2
#define SPAN_I4 32
INLINE vi vi_split(int kind, vi packed, int part)
{
    vi odd = _mm256_srli_epi16(packed, kind == W_I4 ? 4 : 8);
    return kind == W_I4 ? _mm256_and_si256(part ? odd : packed, _mm256_set1_epi8(15))
                        : part ? odd : _mm256_and_si256(packed, _mm256_set1_epi16(255));
}
INLINE vi vi_dot(int kind, vi sum, vi weights, vi x)
{
    sum = kind == W_I4 ? _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x))
                       : _mm256_add_epi32(sum, _mm256_madd_epi16(weights, x));
    /* Keeps the order: the compiler would start all products first, and there are no registers for them. */
    __asm__ volatile("" : "+x"(sum));
    return sum;
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
/* Bytes as numbers of 16 bits: 2 * VF of a row; VF each of two rows, side by side. */
INLINE vi vi_wide(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)); }
INLINE vi vi_side_by_side(const int8_t *p, const int8_t *q)
{
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64((const void *)p), _mm_loadl_epi64((const void *)q)));
}
INLINE vi vi_total(int kind, vi sum) { return kind == W_I4 ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum; }
INLINE int32_t start_of_4(int32_t sum) { return (int32_t)((uint32_t)(uint16_t)(-4 * sum) * 0x10001u); }

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf vf_sums(const vf *a)
{
    vf low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    vf high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return vf_add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

#define ROWS_INT 6
#define ROWS_FLOAT 4
#define ROWS_WIDE 2 /* rows of x that leave registers for four vectors of weights */
#define LANES 2 /* queries that share a pass over keys or values */

#endif
