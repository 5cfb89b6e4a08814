#define LEVEL portable
#include "api.h"
#include "vec128.h"
#include "level.h"
