/* Compiles all kernels for one instruction set: include the set's vectors first, then this. */
#ifndef STRETTO_LEVEL_H
#define STRETTO_LEVEL_H

#include "attend.h"
#include "gemm.h"
#include "pack.h"
#include "rows.h"

#define KERNEL_ENTRY(kernel, parameters, arguments) .kernel = kernel,
/* Defines `level_<set>`, the table of its kernels. */
#define DEFINE_LEVEL(set) const Level level_##set = {.name = #set, EACH_KERNEL(KERNEL_ENTRY)}

#endif
