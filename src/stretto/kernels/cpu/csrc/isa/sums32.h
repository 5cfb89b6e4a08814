/* What plain C and AVX-512 have in common: products of bytes are summed in 32 bits. */
#ifndef STRETTO_SUMS32_H
#define STRETTO_SUMS32_H

#include "lanes.h"

/* Products of quantised weights of `bits` bits, unsigned, with quantised x of 8 bits, summed in 32. See gemm.h. */
#define PARTS(bits) (8 / (bits))
#define X_BITS(bits) 8
#define EXACT_K(bits) MAX_K
INLINE vi vi_split(const int bits, vi packed, int part)
{
    return bits == 8 ? packed : (vi)((vu)packed >> (bits * part)) & (0x01010101 * ((1 << bits) - 1));
}
INLINE vi vi_total(const int bits, vi sum)
{
    (void)bits;
    return sum;
}
INLINE int32_t first_sum(int bits, int32_t x_sum) { return (int32_t)(-(1u << (bits - 1)) * (uint32_t)x_sum); }

#endif
