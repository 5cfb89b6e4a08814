#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define LEVEL avx512
#include "api.h"
#include "vec512.h"
#include "level.h"
#endif
