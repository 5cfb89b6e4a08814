/* The threads that compute. One caller at a time has them, from pool_enter() to pool_leave(). */
#ifndef STRETTO_POOL_H
#define STRETTO_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef void (*Body)(const void *job, int64_t item, int thread);

void pool_enter(void);
void pool_leave(void);
int pool_resize(int threads); /* the caller included; -1 when a thread cannot be started, else 0 */
int pool_threads(void);
int pool_reserve(size_t shared, size_t each); /* scratch in bytes, for all and for each thread; -1 without memory */
void *pool_shared(void);
void *pool_private(int thread);
/* Runs every item once, on any thread. Returns when all are done. */
void pool_run(Body body, const void *job, int64_t items);

#endif
