#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define LEVEL avx2
#include "api.h"
#include "vec256.h"
#include "level.h"
#endif
