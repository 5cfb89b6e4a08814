/* Vectors of VF lanes of 32 bits in GCC's vector extensions: what all instruction sets have in common. */
#ifndef STRETTO_LANES_H
#define STRETTO_LANES_H

#include "../api.h"

#ifndef VF
#define VF 4
#endif
typedef float vf __attribute__((vector_size(VF * 4)));
typedef int32_t vi __attribute__((vector_size(VF * 4)));
typedef uint32_t vu __attribute__((vector_size(VF * 4)));
/* The same in memory, at any address. GCC makes better code of them than of memcpy. */
typedef float vf_stored __attribute__((vector_size(VF * 4), aligned(1), may_alias));
typedef int32_t vi_stored __attribute__((vector_size(VF * 4), aligned(1), may_alias));

INLINE vf vf_zero(void) { return (vf){0}; }
INLINE vf vf_set1(float x) { return x - (vf){0}; }
INLINE vf vf_load(const float *p) { return *(const vf_stored *)p; }
INLINE void vf_store(float *p, vf a) { *(vf_stored *)p = a; }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_from(vi a) { return __builtin_convertvector(a, vf); }
INLINE vf vf_even(vi pairs) { return (vf)((vu)pairs << 16); }
INLINE vf vf_odd(vi pairs) { return (vf)((vu)pairs & 0xffff0000u); }
INLINE vi vi_zero(void) { return (vi){0}; }
INLINE vi vi_set1(int32_t x) { return x - (vi){0}; }
/* Modulo 2^32: a partial sum may be too large where the whole is not. */
INLINE vi vi_add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
INLINE vi vi_bits(vf a) { return (vi)a; }
INLINE vi vi_load(const void *p) { return *(const vi_stored *)p; }
INLINE void vi_store(void *p, vi a) { *(vi_stored *)p = a; }

#endif
