/* Compiles all kernels for one instruction set: include the set's vectors first, then this. */
#ifndef STRETTO_LEVEL_H
#define STRETTO_LEVEL_H

#include "attend.h"
#include "gemm.h"
#include "pack.h"
#include "rows.h"

/* Defines `level_<set>`, the table of its kernels. */
#define DEFINE_LEVEL(set) \
    const Level level_##set = { \
        .name = #set, \
        .pack = pack, \
        .unpack = unpack, \
        .linear = linear, \
        .norm = norm, \
        .act_and_mul = act_and_mul, \
        .cos_sin = cos_sin, \
        .rope_and_cache = rope_and_cache, \
        .paged_attention = paged_attention, \
        .rescore_top_k = rescore_top_k, \
    }

#endif
