/* Vectors of 16 lanes: AVX-512 with VNNI. */
#ifndef STRETTO_VEC512_H
#define STRETTO_VEC512_H

#include "../api.h"

#include <immintrin.h>

#define VF 16
typedef __m512 vf;
typedef __m512i vi;

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_sum(vf a, vf b, vf c) { return vf_fma(a, b, c); }
INLINE vf vf_from(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vf vf_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE vf vf_i8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vf vf_even(vi pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE vf vf_odd(vi pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000))); }
INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }

/* Products of quantised weights of `bits` bits, unsigned, with quantised x. See gemm.h. */
#define PARTS(bits) (8 / (bits))
#define X_BITS(bits) 8
#define EXACT_K(bits) MAX_K
INLINE vi vi_split(const int bits, vi packed, int part)
{
    vi all = part ? _mm512_srli_epi16(packed, bits) : packed;
    return bits == 4 ? _mm512_and_si512(all, _mm512_set1_epi8(15)) : packed;
}
INLINE vi vi_dot(const int bits, vi sum, vi weights, vi x)
{
    (void)bits;
    return _mm512_dpbusd_epi32(sum, weights, x);
}
INLINE vi vi_total(const int bits, vi sum)
{
    (void)bits;
    return sum;
}
INLINE int32_t first_sum(int bits, int32_t x_sum) { return (int32_t)(-(1u << (bits - 1)) * (uint32_t)x_sum); }

#define NATIVE_I16
INLINE vi vi_bits(vf a) { return _mm512_castps_si512(a); }
INLINE vi vi_dot_i16(vi sum, vi a, vi b) { return _mm512_dpwssd_epi32(sum, a, b); }
INLINE vf vf_dot_i16(vf sum, vf a, vf b)
{
    return _mm512_castsi512_ps(vi_dot_i16(vi_bits(sum), vi_bits(a), vi_bits(b)));
}
/* Bytes widened to 16 bits: 2 * VF of a row, or VF of each of two rows, interleaved. */
INLINE vi vi_wide(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p)); }
INLINE vi vi_side_by_side(const int8_t *p, const int8_t *q)
{
    __m128i first = _mm_loadu_si128((const void *)p), second = _mm_loadu_si128((const void *)q);
    __m128i low = _mm_unpacklo_epi8(first, second), high = _mm_unpackhi_epi8(first, second);
    return _mm512_cvtepi8_epi16(_mm256_set_m128i(high, low));
}

INLINE vf vf_fold(vf a, vf b, int step)
{
    switch (step) {
    case 0:
        return vf_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    case 1:
        return vf_add(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
    case 2:
        return vf_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    default:
        return vf_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
}

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf vf_sums(const vf *a)
{
    vf b[8], c[4], d[2];
    for (int i = 0; i < 4; i++) {
        b[2 * i] = vf_fold(a[4 * i], a[4 * i + 1], 0);
        b[2 * i + 1] = vf_fold(a[4 * i + 2], a[4 * i + 3], 0);
        c[i] = vf_fold(b[2 * i], b[2 * i + 1], 1);
    }
    d[0] = vf_fold(c[0], c[1], 2);
    d[1] = vf_fold(c[2], c[3], 2);
    return vf_fold(d[0], d[1], 3);
}

#define ROWS_INT 8
#define ROWS_FLOAT 8
#define ROWS_WIDE 0 /* up to so many rows of x, registers remain for four vectors of weights */
#define LANES 4 /* queries that share one pass over keys or values */
#ifdef NATIVE_BF16
INLINE vf vf_dot_pairs(vf sum, vf a, vf b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#endif

#endif
