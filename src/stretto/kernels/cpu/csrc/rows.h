/* Kernels that treat each token's row alone: norms, gated activations, rotary embedding, rescoring of logits. */
#ifndef STRETTO_ROWS_H
#define STRETTO_ROWS_H

#include "pool.h"
#include "scalar.h"

#define SMALL_WORK 32768 /* with fewer elements, waking another thread costs more than it saves */

/* Rows per item: enough to be worth taking, few enough to balance the threads. */
INLINE int64_t rows_per_item(int64_t m, int64_t width)
{
    if (m * width <= SMALL_WORK || pool_threads() == 1)
        return m;
    return max(1, min(m / (4 * pool_threads()), SMALL_WORK / width));
}

INLINE void run_rows(Body body, const void *job, int64_t m, int64_t rows)
{
    pool_run(body, job, (m + rows - 1) / rows);
}

typedef struct {
    const void *x, *weight;
    void *residual, *y;
    int64_t m, h, type, rows;
    float eps;
} Norm;

/* The RMS norm of one row of h elements, in place. */
INLINE void normalise(float *restrict row, const float *restrict weight, int64_t h, float eps)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; i++)
        sum += row[i] * row[i];
    float scale = 1.0f / sqrtf(sum / (float)h + eps);
    for (int64_t i = 0; i < h; i++)
        row[i] *= scale * weight[i];
}

static void norm_item(const void *job, int64_t item, int thread)
{
    const Norm *a = job;
    float *restrict row = pool_private(thread), *restrict weight = row + a->h, *restrict other = weight + a->h;
    widen(weight, a->weight, a->h, a->type);
    for (int64_t t = item * a->rows; t < min(a->m, (item + 1) * a->rows); t++) {
        widen(row, at(a->x, t * a->h, a->type), a->h, a->type);
        if (a->residual) {
            void *sum = at(a->residual, t * a->h, a->type);
            widen(other, sum, a->h, a->type);
            for (int64_t i = 0; i < a->h; i++)
                row[i] += other[i];
            narrow(sum, row, a->h, a->type);
        }
        normalise(row, weight, a->h, a->eps);
        narrow(at(a->y, t * a->h, a->type), row, a->h, a->type);
    }
}

/* y = RMS norm of x, times the weight [h]. x and y are [m, h]. With a residual [m, h], x is added to it first, and the
 * norm is of the sum. */
static int norm(const void *x, void *residual, const void *weight, void *y, int64_t m, int64_t h, float eps,
                int64_t type)
{
    Norm job = {x, weight, residual, y, m, h, type, rows_per_item(m, h), eps};
    if (m < 1 || h < 1)
        return m < 0 || h < 1 ? BAD_SHAPE : OK;
    if (pool_reserve(0, (size_t)(3 * h) * sizeof(float)))
        return NO_MEMORY;
    run_rows(norm_item, &job, m, job.rows);
    return OK;
}

typedef struct {
    const void *x;
    void *y;
    int64_t m, f, activation, type, rows;
} ActAndMul;

static void act_and_mul_item(const void *job, int64_t item, int thread)
{
    const ActAndMul *a = job;
    int64_t f = a->f;
    float *restrict gates = pool_private(thread), *restrict ups = gates + f;
    for (int64_t t = item * a->rows; t < min(a->m, (item + 1) * a->rows); t++) {
        widen(gates, at(a->x, 2 * t * f, a->type), f, a->type);
        widen(ups, at(a->x, (2 * t + 1) * f, a->type), f, a->type);
        if (a->activation == SILU)
            for (int64_t i = 0; i < f; i++)
                gates[i] = gates[i] / (1.0f + exp_of(-gates[i])) * ups[i];
        else if (a->activation == GELU)
            for (int64_t i = 0; i < f; i++)
                gates[i] = 0.5f * gates[i] * (1.0f + erf_of(gates[i] * 0.70710678f)) * ups[i];
        else if (a->activation == GELU_TANH)
            for (int64_t i = 0; i < f; i++) {
                float g = gates[i], inner = 0.79788456f * (g + 0.044715f * g * g * g);
                gates[i] = 0.5f * g * (1.0f + tanh_of(inner)) * ups[i];
            }
        else
            for (int64_t i = 0; i < f; i++)
                gates[i] = (gates[i] < 0.0f ? 0.0f : gates[i]) * ups[i];
        narrow(at(a->y, t * f, a->type), gates, f, a->type);
    }
}

/* y [m, f] = activation(x[:, :f]) * x[:, f:], for x [m, 2f]. */
static int act_and_mul(const void *x, void *y, int64_t m, int64_t f, int64_t activation, int64_t type)
{
    ActAndMul job = {x, y, m, f, activation, type, rows_per_item(m, 4 * f)};
    if (m < 1 || f < 1)
        return m < 0 || f < 1 ? BAD_SHAPE : OK;
    if (pool_reserve(0, (size_t)(2 * f) * sizeof(float)))
        return NO_MEMORY;
    run_rows(act_and_mul_item, &job, m, job.rows);
    return OK;
}

typedef struct {
    const Step *step;
    const float *frequencies;
    float *angles;
    int64_t pairs, rows;
    float scale;
} CosSin;

static void cos_sin_item(const void *job, int64_t item, int thread)
{
    const CosSin *a = job;
    (void)thread;
    for (int64_t t = item * a->rows; t < min(a->step->tokens, (item + 1) * a->rows); t++)
        for (int64_t i = 0; i < a->pairs; i++) {
            float angle = (float)a->step->positions[t] * a->frequencies[i], *angle_row = a->angles + 2 * t * a->pairs;
            angle_row[i] = a->scale * cosf(angle);
            angle_row[a->pairs + i] = a->scale * sinf(angle);
        }
}

/* Cosines, then sines, of position * frequency, times the scale: angles [tokens, 2, pairs]. */
static int cos_sin(const Step *step, const float *frequencies, int64_t pairs, float scale, float *angles)
{
    CosSin job = {step, frequencies, angles, pairs, rows_per_item(step->tokens, 32 * pairs), scale};
    if (step->tokens > 0)
        run_rows(cos_sin_item, &job, step->tokens, job.rows);
    return OK;
}

typedef struct {
    const Step *step;
    const AttentionConfig *config;
    char *qkv, *keys, *values;
    const void *norms;
    const float *angles;
    int64_t pairs, rows;
} RopeAndCache;

INLINE void rotate_halves(float *restrict low, float *restrict high, const float *restrict angle_row, int64_t pairs)
{
    for (int64_t i = 0; i < pairs; i++) {
        float first = low[i], second = high[i];
        low[i] = first * angle_row[i] - second * angle_row[pairs + i];
        high[i] = second * angle_row[i] + first * angle_row[pairs + i];
    }
}

static void rope_and_cache_item(const void *job, int64_t item, int thread)
{
    const RopeAndCache *a = job;
    const Step *step = a->step;
    const AttentionConfig *config = a->config;
    int64_t heads = config->heads, rotated = heads + config->kv_heads, d = config->head_dim, size = step->block_size;
    int64_t width = (rotated + config->kv_heads) * d, row_bytes = kv_bytes(d, step->kv_type);
    float *lanes = pool_private(thread), *weight = lanes + width;
    if (config->norm != NORM_NONE)
        widen(weight, a->norms, rotated * d, step->type);
    for (int64_t t = item * a->rows; t < min(step->tokens, (item + 1) * a->rows); t++) {
        void *row = at(a->qkv, t * width, step->type);
        int64_t first = step->slots[t] / size * config->kv_heads * size + step->slots[t] % size;
        for (int64_t h = 0; h < config->kv_heads; h++)
            for (int64_t i = 0; i < row_bytes; i += 64) {
                __builtin_prefetch(a->keys + (first + h * size) * row_bytes + i, 1);
                __builtin_prefetch(a->values + (first + h * size) * row_bytes + i, 1);
            }
        widen(lanes, row, width, step->type);
        if (config->norm == NORM_ROW) {
            normalise(lanes, weight, heads * d, config->eps);
            normalise(lanes + heads * d, weight + heads * d, config->kv_heads * d, config->eps);
        }
        for (int64_t h = 0; h < rotated; h++) {
            if (config->norm == NORM_HEAD)
                normalise(lanes + h * d, weight + h * d, d, config->eps);
            rotate_halves(lanes + h * d, lanes + h * d + a->pairs, a->angles + 2 * t * a->pairs, a->pairs);
        }
        narrow(row, lanes, heads * d, step->type);
        for (int64_t h = 0; h < config->kv_heads; h++) {
            int64_t slot = (first + h * size) * row_bytes;
            narrow_kv(a->keys + slot, lanes + (heads + h) * d, d, step->kv_type);
            narrow_kv(a->values + slot, lanes + (rotated + h) * d, d, step->kv_type);
        }
    }
}

INLINE int64_t values_offset(const Step *step, const AttentionConfig *config)
{
    return step->blocks * config->kv_heads * step->block_size * kv_bytes(config->head_dim, step->kv_type);
}

/* Normalises and rotates the queries and keys of qkv [tokens, (heads + 2 kv_heads) * head_dim], and writes keys and
 * values into their slots of the cache. Queries are written back to qkv. The first `dims` of a head are rotated by
 * `angles` [tokens, 2, dims / 2]. */
static int rope_and_cache(const Step *step, const AttentionConfig *config, void *qkv, const void *norms,
                          const float *angles, int64_t dims, void *cache)
{
    int64_t width = (config->heads + 2 * config->kv_heads) * config->head_dim;
    char *keys = cache, *values = keys + values_offset(step, config);
    int64_t rows = rows_per_item(step->tokens, 2 * width);
    RopeAndCache job = {step, config, qkv, keys, values, norms, angles, dims / 2, rows};
    if (dims > config->head_dim || dims % 2)
        return BAD_SHAPE;
    if (step->tokens < 1)
        return OK;
    if (pool_reserve(0, (size_t)(2 * width) * sizeof(float)))
        return NO_MEMORY;
    run_rows(rope_and_cache_item, &job, step->tokens, job.rows);
    return OK;
}

typedef struct {
    float value;
    int64_t index;
} Logit;

/* Order of the heap of largest logits, whose root is the worst of them: of equal logits, the later is worse. */
INLINE int worse(Logit a, Logit b) { return a.value < b.value || (a.value == b.value && a.index > b.index); }

INLINE void sift(Logit *heap, int64_t n)
{
    for (int64_t i = 0, child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && worse(heap[child + 1], heap[child]))
            child++;
        if (!worse(heap[child], heap[i]))
            return;
        Logit moved = heap[i];
        heap[i] = heap[child];
        heap[child] = moved;
    }
}

/* Puts the k largest of x [n] into a heap. A place for which no number was found has the index n. */
INLINE void find_largest(const float *x, int64_t n, Logit *heap, int64_t k)
{
    for (int64_t i = 0; i < k; i++)
        heap[i] = (Logit){-INFINITY, n};
    for (int64_t start = 0; start < n; start += 64) {
        int64_t end = min(n, start + 64);
        float least = heap[0].value;
        int any = 0;
#pragma omp simd reduction(| : any)
        for (int64_t i = start; i < end; i++)
            any |= x[i] > least;
        /* While the heap holds fewer than k logits, -infinity enters too. NaN never does. */
        for (int64_t i = start; (any || heap[0].index == n) && i < end; i++)
            if (x[i] > heap[0].value || (x[i] == heap[0].value && heap[0].index == n)) {
                heap[0] = (Logit){x[i], i};
                sift(heap, k);
            }
    }
}

typedef struct {
    float *logits;
    const void *x, *rows;
    int64_t n, k, count, type, rows_type;
} Rescore;

static void rescore_item(const void *job, int64_t item, int thread)
{
    const Rescore *a = job;
    Logit *heap = pool_private(thread);
    float *x = (float *)(heap + a->count), *row = x + a->k, *logits = a->logits + item * a->n;
    find_largest(logits, a->n, heap, a->count);
    widen(x, at(a->x, item * a->k, a->type), a->k, a->type);
    for (int64_t i = 0; i < a->count; i++) {
        float sum = 0;
        if (heap[i].index == a->n)
            continue;
        widen(row, at(a->rows, heap[i].index * a->k, a->rows_type), a->k, a->rows_type);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < a->k; j++)
            sum += x[j] * row[j];
        logits[heap[i].index] = sum;
    }
}

/* Computes the `count` largest logits of each row [m, n] again, from x [m, k] and the weights before they were
 * quantised, rows [n, k]. NaN is never among the largest. Of equal logits the first are taken. */
static int rescore_top_k(float *logits, const void *x, const void *rows, int64_t m, int64_t n, int64_t k, int64_t count,
                         int64_t type, int64_t rows_type)
{
    Rescore job = {logits, x, rows, n, k, count, type, rows_type};
    if (count < 1 || count > n || k < 1)
        return BAD_SHAPE;
    if (pool_reserve(0, (size_t)count * sizeof(Logit) + (size_t)(2 * k) * sizeof(float)))
        return NO_MEMORY;
    pool_run(rescore_item, &job, m);
    return OK;
}

#endif
