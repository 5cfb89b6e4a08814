/* The vectors that a level file has chosen; where none has, those that any machine has. */
#ifndef VF
#include "vec128.h"
#endif
