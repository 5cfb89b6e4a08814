/* All kernels, for the vectors a level file has chosen. */
#include "pool.h"

#include "scalar.h"

#include "rows.h"

#include "pack.h"

#include "gemm.h"

#include "decode.h"

#include "prefill.h"

#include "attend.h"

#define JOIN(a, b) a##b
#define EXPORT(level) JOIN(level_, level)
#define TEXT(x) #x
#define NAME(level) TEXT(level)

const Level EXPORT(LEVEL) = {
    .name = NAME(LEVEL),
    .pack = pack,
    .unpack = unpack,
    .linear = linear,
    .norm = norm,
    .gate = gate,
    .rotate = rotate,
    .place = place,
    .attend = attend,
    .sharpen = sharpen,
    .top = top,
};
