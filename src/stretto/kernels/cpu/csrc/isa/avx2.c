/* The kernels for AVX2 with FMA. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "vec256.h"

#include "../level.h"

DEFINE_LEVEL(avx2);
#endif
