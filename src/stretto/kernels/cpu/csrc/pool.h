/* The threads that compute. One caller at a time: pool_enter() to pool_leave(). */
#ifndef STRETTO_POOL_H
#define STRETTO_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef void (*Body)(const void *job, int64_t item, int thread);

void pool_enter(void);
void pool_leave(void);
int pool_resize(int threads); /* callers included; 0, or -1 when a thread cannot be had */
int pool_threads(void);
int pool_reserve(size_t shared, size_t each); /* before pool_run: scratch of at least so many bytes, or -1 */
void *pool_shared(void);
void *pool_private(int thread);
void pool_run(Body body, const void *job, int64_t items); /* every item once, on any thread; returns when all done */

#endif
