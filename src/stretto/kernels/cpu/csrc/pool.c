/* Worker threads that spin while a step runs and sleep between steps.
 *
 * Each thread owns a share of the items. When it has run them, it takes items from the others. The caller never waits
 * for a worker that has not started: on a shared machine another process may have that core, and then the caller does
 * the work. A worker spins for SPIN_NS until the next job comes, then sleeps on a futex. */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define SPIN_NS 50000
#define SPINS_PER_LOOK 64

#if defined(__x86_64__) || defined(__i386__)
#define relax() __builtin_ia32_pause()
#else
#define relax() ((void)0)
#endif

typedef struct {
    _Alignas(128) atomic_llong next;
    int64_t end;
    void *scratch;
    size_t size;
} Share;

static Share shares[MAX_THREADS];
static pthread_t workers[MAX_THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int threads = 1, wanted = 1;
static Body body;
static const void *job;
static void *shared;
static size_t shared_size;
static _Alignas(128) atomic_uint generation; /* number of the newest job; workers wait for it to change */
static _Alignas(128) atomic_uint open_job; /* 1 while workers may start on the job */
static _Alignas(128) atomic_int inside; /* workers that may be reading the job */
static atomic_int asleep;
static atomic_int stopping;

static void after_fork(void)
{
    /* A forked child has no workers. Its next job starts them. */
    threads = 1;
    atomic_store(&inside, 0);
    atomic_store(&asleep, 0);
    atomic_store(&open_job, 0);
    pthread_mutex_init(&lock, NULL);
}

static void before_first(void) { pthread_atfork(NULL, NULL, after_fork); }

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void work(int self)
{
    for (int i = 0; i < threads; i++) {
        Share *share = &shares[(self + i) % threads];
        for (;;) {
            if (atomic_load_explicit(&share->next, memory_order_relaxed) >= share->end)
                break;
            int64_t item = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed);
            if (item >= share->end)
                break;
            body(job, item, self);
        }
    }
}

static void await_job(unsigned seen)
{
    int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (atomic_load_explicit(&generation, memory_order_acquire) != seen)
                return;
            relax();
        }
    } while (now_ns() < until);
    atomic_fetch_add(&asleep, 1);
    while (atomic_load(&generation) == seen)
        syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&asleep, 1);
}

static void *worker(void *argument)
{
    int self = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        await_job(seen);
        seen = atomic_load(&generation);
        if (atomic_load(&stopping))
            return NULL;
        atomic_fetch_add(&inside, 1);
        if (atomic_load(&open_job) != 0)
            work(self);
        atomic_fetch_sub(&inside, 1);
    }
}

static void announce(void)
{
    if (atomic_fetch_add(&generation, 1) + 1 == 0)
        atomic_fetch_add(&generation, 1);
    if (atomic_load(&asleep))
        syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

static void stop(void)
{
    atomic_store(&stopping, 1);
    announce();
    for (int i = 1; i < threads; i++)
        pthread_join(workers[i], NULL);
    atomic_store(&stopping, 0);
    threads = 1;
}

static int start(void)
{
    /* A worker has seen job 0 when it starts, so no job has the number 0. */
    atomic_store(&generation, 0);
    for (; threads < wanted; threads++)
        if (pthread_create(&workers[threads], NULL, worker, (void *)(intptr_t)threads))
            return -1;
    return 0;
}

void pool_enter(void)
{
    pthread_once(&once, before_first);
    pthread_mutex_lock(&lock);
}

void pool_leave(void) { pthread_mutex_unlock(&lock); }

int pool_resize(int count)
{
    count = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
    pool_enter();
    stop();
    wanted = count;
    int result = start();
    if (result)
        wanted = threads;
    pool_leave();
    return result;
}

int pool_threads(void) { return wanted; }

static int grow(void **memory, size_t *size, size_t needed)
{
    if (needed <= *size)
        return 0;
    free(*memory);
    *size = 0;
    needed = (needed + needed / 4 + 4095) / 4096 * 4096;
    *memory = aligned_alloc(4096, needed);
    if (!*memory)
        return -1;
    *size = needed;
    return 0;
}

int pool_reserve(size_t all, size_t each)
{
    int result = grow(&shared, &shared_size, all);
    for (int i = 0; i < wanted && !result; i++)
        result = grow(&shares[i].scratch, &shares[i].size, each);
    return result;
}

void *pool_shared(void) { return shared; }

void *pool_private(int thread) { return shares[thread].scratch; }

void pool_run(Body function, const void *argument, int64_t items)
{
    if (threads < wanted && start())
        wanted = threads;
    if (items <= 1 || threads == 1) {
        for (int64_t i = 0; i < items; i++)
            function(argument, i, 0);
        return;
    }
    body = function;
    job = argument;
    for (int i = 0; i < threads; i++) {
        shares[i].end = items * (i + 1) / threads;
        atomic_store_explicit(&shares[i].next, items * i / threads, memory_order_relaxed);
    }
    atomic_store(&open_job, 1);
    announce();
    work(0);
    atomic_store(&open_job, 0);
    for (int spins = 0; atomic_load(&inside); spins++) {
        relax();
        if (spins > 10000)
            sched_yield();
    }
}
