/* The exported functions. They use the kernels of one instruction set (a level), one caller at a time. */
#include "api.h"

#include "pool.h"

#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

extern const Level level_portable;
#if defined(__x86_64__)
extern const Level level_avx512bf16, level_avx512, level_avx2;
#endif

static const Level *level = &level_portable;

static const Level *level_number(int number)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
              && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
              && __builtin_cpu_supports("avx512vnni");
    switch (number) {
    case 0:
        return avx512 && __builtin_cpu_supports("avx512bf16") ? &level_avx512bf16 : NULL;
    case 1:
        return avx512 ? &level_avx512 : NULL;
    case 2:
        return avx2 ? &level_avx2 : NULL;
    }
#endif
    return number == 3 ? &level_portable : NULL;
}

/* The name of level `number`: 0 is the fastest, 3 the portable one. NULL if this CPU does not have it. */
EXPORTED const char *stretto_level(int number)
{
    const Level *found = level_number(number);
    return found ? found->name : NULL;
}

EXPORTED int stretto_use(int number)
{
    const Level *found = level_number(number);
    if (!found)
        return BAD_SHAPE;
    pool_enter();
    level = found;
    pool_leave();
    return OK;
}

EXPORTED int stretto_threads(int count) { return pool_resize(count); }

EXPORTED int64_t stretto_packed_bytes(const Weights *w) { return (w->n + PANEL - 1) / PANEL * panel_bytes(w); }

#define EXPORT_KERNEL(kernel, parameters, arguments) \
    EXPORTED int stretto_##kernel parameters \
    { \
        pool_enter(); \
        int result = level->kernel arguments; \
        pool_leave(); \
        return result; \
    }
EACH_KERNEL(EXPORT_KERNEL)

/* OK if every index of the step points into its arrays and the cache. */
EXPORTED int stretto_check(const Step *step)
{
    if (step->starts[0] != 0 || step->starts[step->sequences] != step->tokens)
        return BAD_SHAPE;
    for (int64_t t = 0; t < step->tokens; t++)
        if (step->slots[t] < 0 || step->slots[t] >= step->blocks * step->block_size)
            return BAD_SHAPE;
    for (int64_t s = 0; s < step->sequences; s++) {
        int64_t queries = (int64_t)step->starts[s + 1] - step->starts[s], context = step->contexts[s];
        if (queries < 1 || context < queries || context > step->width * step->block_size)
            return BAD_SHAPE;
        for (int64_t i = 0; i < (context + step->block_size - 1) / step->block_size; i++)
            if (step->tables[s * step->width + i] < 0 || step->tables[s * step->width + i] >= step->blocks)
                return BAD_SHAPE;
    }
    return OK;
}

static int run_call(const Call *a, const Run *run)
{
    const Step *step = run->step;
    void *from = run->buffers[a->source], *to = run->buffers[a->target];
    switch (a->call) {
    case CALL_LINEAR:
        return level->linear(a->of, from, to, step->tokens, step->type);
    case CALL_NORM:
        return level->norm(from, NULL, a->of, to, step->tokens, a->width, a->eps, step->type);
    case CALL_ADD_NORM:
        return level->norm(from, run->buffers[1], a->of, to, step->tokens, a->width, a->eps, step->type);
    case CALL_ACT_AND_MUL:
        return level->act_and_mul(from, to, step->tokens, a->width, a->activation, step->type);
    case CALL_ROPE_AND_CACHE:
        return level->rope_and_cache(step, a->config, from, a->of, run->angles[a->rotation], run->dims[a->rotation],
                                     run->layers[a->layer]);
    case CALL_ATTENTION:
        return level->paged_attention(step, a->config, from,
                                      (a->config->heads + 2 * a->config->kv_heads) * a->config->head_dim,
                                      run->layers[a->layer], to);
    }
    return BAD_SHAPE;
}

/* Makes the calls in order. Stops at the first that fails. */
EXPORTED int stretto_run(const Call *calls, int64_t count, const Run *run)
{
    int result = OK;
    pool_enter();
    for (int64_t i = 0; i < count && result == OK; i++)
        result = run_call(&calls[i], run);
    pool_leave();
    return result;
}
