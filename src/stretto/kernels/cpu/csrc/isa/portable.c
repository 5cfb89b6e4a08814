/* The kernels in plain C, for any machine. */
#include "vec128.h"

#include "../level.h"

DEFINE_LEVEL(portable);
