/* The kernels for AVX-512 with VNNI and products of bfloat16. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define HAS_BF16 1
#include "vec512.h"

#include "../level.h"

DEFINE_LEVEL(avx512bf16);
#endif
