/* The kernels for AVX-512 with VNNI. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#include "vec512.h"

#include "../level.h"

DEFINE_LEVEL(avx512);
#endif
