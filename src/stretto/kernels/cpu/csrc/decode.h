/* Attention of few queries over many keys. Each key and value is read once for all queries of its head.
 *
 * The softmax is computed online (Milakov and Gimelshein, 2018) over tiles of keys. Long contexts are split into parts,
 * whose results are merged as in Flash-Decoding (Dao et al., 2023).
 *
 * With an int8 cache, queries and softmax weights are quantised to 16 bits and multiplied as integers, if the
 * instruction set has such products and a head has at most LONGEST_SUM elements. Each query has a scale; softmax
 * weights have one for each query and tile. Sums stay below 32767 * 127 * 512 < 2^31. */
#ifndef STRETTO_DECODE_H
#define STRETTO_DECODE_H

#include "scalar.h"

#define KEYS 64 /* keys in a tile */
#define MAX_DECODE_LANES 16 /* queries times heads that share a key; with more of them, prefill.h is faster */
#define SPAN (2 * VF)
#define MAX_Q16 32767.0f /* the largest quantised value of 16 bits */
#define LONGEST_SUM 512 /* products of 16-bit and 8-bit values that are added as integers */

/* An item of work: queries [query, query + queries) of a sequence, one KV head, keys [from, to). `part` is the index of
 * its partial result, or -1 when it writes the output. A list ends with an item of sequence -1. */
typedef struct {
    int64_t sequence, head, query, queries, from, to, part;
} Item;

typedef struct {
    const Step *step;
    const AttentionConfig *config;
    const void *q, *keys, *values;
    void *out;
    const Item *items;
    float *parts;
    int64_t ldq, share; /* elements from row to row of q; query heads that share a key */
    int64_t width; /* head_dim rounded up to SPAN */
} Attention;

/* The running softmax of one query. */
typedef struct {
    float peak, total;
    int64_t from, to; /* the keys it sees */
} Running;

INLINE const void *row_of(const Attention *a, const void *cache, const Item *item, int64_t key)
{
    int64_t block = a->step->tables[item->sequence * a->step->width + key / a->step->block_size];
    int64_t row = (block * a->config->kv_heads + item->head) * a->step->block_size + key % a->step->block_size;
    return (const char *)cache + row * kv_bytes(a->config->head_dim, a->step->kv_type);
}

INLINE int64_t query_position(const Attention *a, const Item *item, int64_t query)
{
    int64_t queries = a->step->starts[item->sequence + 1] - a->step->starts[item->sequence];
    return a->step->contexts[item->sequence] - queries + query;
}

INLINE int64_t first_key(const Attention *a, int64_t position)
{
    return a->config->window > 0 ? max(0, position + 1 - a->config->window) : 0;
}

/* Two vectors of a key or value. A vector of bf16 pairs is split into its even and its odd elements. */
INLINE void load_span(const void *row, int64_t i, int64_t type, vf *low, vf *high)
{
    if (type == BF16) {
        vi pairs = vi_load((const uint16_t *)row + i);
        *low = vf_even(pairs);
        *high = vf_odd(pairs);
    } else if (type == I8) {
        *low = vf_i8((const int8_t *)row + i);
        *high = vf_i8((const int8_t *)row + i + VF);
    } else {
        *low = vf_load((const float *)row + i);
        *high = vf_load((const float *)row + i + VF);
    }
}

/* The index of element i of a query, in the order in which load_span yields the elements of a key. */
INLINE int64_t query_index(int64_t i, int64_t type)
{
    return type == BF16 ? i / SPAN * SPAN + i % 2 * VF + i % SPAN / 2 : i;
}

/* The rows of the next tile, which are prefetched while this one is computed. Blocks are scattered, so the hardware
 * does not prefetch them. Its queue is short, so keys are fetched along with the scores, and values along with the
 * sums. */
typedef struct {
    const void *keys[KEYS], *values[KEYS];
    int64_t bytes;
} Prefetch;

INLINE void prefetch(const void *row, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)row + i, 0, 2);
}

/* Each sum is a variable of its own, as in gemm.h. A lane has two, so an addition seldom waits for the last one. */
#define EACH_LANE(CASE) CASE(0) CASE(1) CASE(2) CASE(3)

INLINE void score_lanes(const int lanes, const int64_t type, const float *q, const void *const *rows, int64_t count,
                        int64_t width, float *scores, const Prefetch *next)
{
    for (int64_t first = 0; first < count; first += VF) {
        vf sums[LANES][VF];
        for (int i = 0; i < VF; i++) {
            vf low0, low1, low2, low3, high0, high1, high2, high3;
#define NO_SCORE(l) low##l = high##l = vf_zero();
            EACH_LANE(NO_SCORE)
            if (next)
                prefetch(next->keys[first + i], next->bytes);
            for (int64_t d = 0; d < width; d += SPAN) {
                vf low, high;
                load_span(rows[first + i], d, type, &low, &high);
#define SCORE(l) \
    if (l < lanes) { \
        low##l = vf_sum(low, vf_load(q + l * width + d), low##l); \
        high##l = vf_sum(high, vf_load(q + l * width + d + VF), high##l); \
    }
                EACH_LANE(SCORE)
            }
#define KEEP_SCORE(l) \
    if (l < lanes) \
        sums[l < LANES ? l : 0][i] = vf_add(low##l, high##l);
            EACH_LANE(KEEP_SCORE)
        }
        UNROLL
        for (int l = 0; l < lanes; l++)
            vf_store(scores + l * KEYS + first, vf_sums(sums[l]));
    }
}

/* Adds weighted values to elements [d, d + spans * SPAN) of the output of each lane. */
INLINE void value_span(const int lanes, const int spans, const int64_t type, const float *p, const void *const *rows,
                       int64_t count, int64_t width, float *out, int64_t d, const Prefetch *next)
{
    vf a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3;
#define LOAD_VALUE(l) \
    a##l = l < lanes ? vf_load(out + l * width + d) : vf_zero(); \
    b##l = l < lanes ? vf_load(out + l * width + d + VF) : vf_zero(); \
    c##l = l < lanes && spans > 1 ? vf_load(out + l * width + d + SPAN) : vf_zero(); \
    d##l = l < lanes && spans > 1 ? vf_load(out + l * width + d + SPAN + VF) : vf_zero();
    EACH_LANE(LOAD_VALUE)
    for (int64_t i = 0; i < count; i++) {
        vf first, second, third, fourth;
        if (next && i % ((width + 2 * SPAN - 1) / (2 * SPAN)) == d / (2 * SPAN))
            prefetch(next->values[i], next->bytes);
        load_span(rows[i], d, type, &first, &second);
        if (spans > 1)
            load_span(rows[i], d + SPAN, type, &third, &fourth);
#define ADD_VALUE(l) \
    if (l < lanes) { \
        vf weight = vf_set1(p[l * KEYS + i]); \
        a##l = vf_sum(first, weight, a##l); \
        b##l = vf_sum(second, weight, b##l); \
        if (spans > 1) { \
            c##l = vf_sum(third, weight, c##l); \
            d##l = vf_sum(fourth, weight, d##l); \
        } \
    }
        EACH_LANE(ADD_VALUE)
    }
#define KEEP_VALUE(l) \
    if (l < lanes) { \
        vf_store(out + l * width + d, a##l); \
        vf_store(out + l * width + d + VF, b##l); \
        if (spans > 1) { \
            vf_store(out + l * width + d + SPAN, c##l); \
            vf_store(out + l * width + d + SPAN + VF, d##l); \
        } \
    }
    EACH_LANE(KEEP_VALUE)
}

INLINE void value_lanes(const int lanes, const int64_t type, const float *p, const void *const *rows, int64_t count,
                        int64_t width, float *out, const Prefetch *next)
{
    int64_t d = 0;
    for (; d + 2 * SPAN <= width; d += 2 * SPAN)
        value_span(lanes, 2, type, p, rows, count, width, out, d, next);
    if (d < width)
        value_span(lanes, 1, type, p, rows, count, width, out, d, next);
}

/* The same two with integers. `scales` are those of the quantised queries, or softmax weights. */
INLINE void score_q16(const int lanes, const int16_t *q, const float *scales, const void *const *rows, int64_t count,
                      int64_t width, float *scores, const Prefetch *next)
{
    for (int64_t first = 0; first < count; first += VF) {
        vf sums[LANES][VF];
        for (int i = 0; i < VF; i++) {
            const int8_t *row = rows[first + i];
            vi sum0, sum1, sum2, sum3;
#define NO_SUM(l) sum##l = vi_zero();
            EACH_LANE(NO_SUM)
            if (next)
                prefetch(next->keys[first + i], next->bytes);
            for (int64_t d = 0; d < width; d += SPAN) {
                vi keys = vi_wide(row + d);
#define SCORE_Q16(l) \
    if (l < lanes) \
        sum##l = vi_dot_i16(sum##l, keys, vi_load(q + l * width + d));
                EACH_LANE(SCORE_Q16)
            }
#define KEEP_SUM(l) \
    if (l < lanes) \
        sums[l < LANES ? l : 0][i] = vf_from(sum##l);
            EACH_LANE(KEEP_SUM)
        }
        UNROLL
        for (int l = 0; l < lanes; l++)
            vf_store(scores + l * KEYS + first, vf_mul(vf_sums(sums[l]), vf_set1(scales[l])));
    }
}

INLINE void value_q16(const int lanes, const int16_t *p, const float *scales, const void *const *rows, int64_t count,
                      int64_t width, float *out, const Prefetch *next)
{
    for (int64_t d = 0; d < width; d += SPAN) {
        vi a0, a1, a2, a3, b0, b1, b2, b3;
#define NO_VALUE(l) a##l = b##l = vi_zero();
        EACH_LANE(NO_VALUE)
        for (int64_t i = 0; i < count; i += 2) {
            const int8_t *even = (const int8_t *)rows[i] + d, *odd = (const int8_t *)rows[i + 1] + d;
            if (next && i / 2 % (width / SPAN) == d / SPAN) {
                prefetch(next->values[i], next->bytes);
                prefetch(next->values[i + 1], next->bytes);
            }
            vi low = vi_side_by_side(even, odd), high = vi_side_by_side(even + VF, odd + VF);
#define ADD_Q16(l) \
    if (l < lanes) { \
        int32_t pair; \
        memcpy(&pair, p + l * KEYS + i, sizeof pair); \
        a##l = vi_dot_i16(a##l, low, vi_set1(pair)); \
        b##l = vi_dot_i16(b##l, high, vi_set1(pair)); \
    }
            EACH_LANE(ADD_Q16)
        }
#define KEEP_Q16(l) \
    if (l < lanes) { \
        float *sum = out + l * width + d; \
        vf scale = vf_set1(scales[l]); \
        vf_store(sum, vf_fma(vf_from(a##l), scale, vf_load(sum))); \
        vf_store(sum + VF, vf_fma(vf_from(b##l), scale, vf_load(sum + VF))); \
    }
        EACH_LANE(KEEP_Q16)
    }
}

/* Turns the scores of one query into softmax weights, and rescales its output so far. */
INLINE void softmax_row(const Attention *a, float *restrict s, Running *run, int64_t key, float *restrict out,
                        int64_t width)
{
    int64_t from = max(0, run->from - key), to = min(KEYS, run->to - key);
    for (int64_t i = 0; i < KEYS; i++) {
        float x = s[i] * a->config->scale;
        s[i] = x;
    }
    if (a->config->softcap > 0)
        for (int64_t i = 0; i < KEYS; i++)
            s[i] = a->config->softcap * tanh_of(s[i] / a->config->softcap);
    float peak = run->peak;
    for (int64_t i = 0; i < KEYS; i++)
        s[i] = i < from || i >= to ? -INFINITY : s[i];
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < KEYS; i++)
        peak = s[i] > peak ? s[i] : peak;
    float shift = peak == -INFINITY ? 0.0f : peak, total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < KEYS; i++) {
        s[i] = exp_below(s[i] - shift);
        total += s[i];
    }
    if (peak > run->peak) {
        float fade = exp_below(run->peak - shift);
        for (int64_t i = 0; i < width; i++)
            out[i] *= fade;
        run->total *= fade;
        run->peak = peak;
    }
    run->total += total;
}

INLINE void find_rows(const Attention *a, const Item *item, int64_t key, const void **keys, const void **values)
{
    int64_t size = a->step->block_size, width = kv_bytes(a->config->head_dim, a->step->kv_type);
    for (int64_t i = 0; i < KEYS;) {
        int64_t of = min(key + i, item->to - 1), left = of == key + i ? size - of % size : 1;
        const char *k = row_of(a, a->keys, item, of), *v = row_of(a, a->values, item, of);
        for (left = min(left, max(1, item->to - of)); left > 0 && i < KEYS; left--, i++, k += width, v += width) {
            keys[i] = k;
            values[i] = v;
        }
    }
}

/* Copies rows whose length is not a multiple of SPAN: as floats, with zeros behind them. */
INLINE void pad_rows(const Attention *a, const void **rows, float *copies, int64_t width)
{
    for (int64_t i = 0; i < KEYS; i++, copies += width) {
        widen_kv(copies, rows[i], a->config->head_dim, a->step->kv_type);
        memset(copies + a->config->head_dim, 0, (size_t)(width - a->config->head_dim) * sizeof(float));
        rows[i] = copies;
    }
}

INLINE void read_queries(const Attention *a, const Item *item, float *q, float *raw, int64_t width, int64_t type)
{
    int64_t share = a->share, d = a->config->head_dim;
    for (int64_t l = 0; l < item->queries * share; l++) {
        int64_t row = a->step->starts[item->sequence] + item->query + l / share;
        widen(raw, at(a->q, row * a->ldq + (item->head * share + l % share) * d, a->step->type), d, a->step->type);
        memset(q + l * width, 0, (size_t)width * sizeof(float));
        for (int64_t i = 0; i < d; i++)
            q[l * width + query_index(i, type)] = raw[i];
    }
}

INLINE void write_row(const Attention *a, const Item *item, int64_t lane, const float *x, float total)
{
    int64_t share = a->share, row = a->step->starts[item->sequence] + item->query + lane / share;
    void *out =
        at(a->out, (row * a->config->heads + item->head * share + lane % share) * a->config->head_dim, a->step->type);
    float line[a->config->head_dim], inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t i = 0; i < a->config->head_dim; i++)
        line[i] = x[i] * inverse;
    narrow(out, line, a->config->head_dim, a->step->type);
}

INLINE int64_t decode_scratch(int64_t width)
{
    return MAX_DECODE_LANES * (2 * width + KEYS) + width + 2 * KEYS * width;
}

/* Makes `call` for lanes l, l + 1, ..., as many at a time as a pass has registers for. */
#define IN_PASSES(lanes, call) \
    for (int64_t l = 0, some; l < (lanes); l += some) { \
        some = LANES >= 4 && (lanes) - l >= 4 ? LANES : (lanes) - l >= 2 ? 2 : 1; \
        if (LANES >= 4 && some == LANES) \
            call(LANES); \
        else if (some == 2) \
            call(2); \
        else \
            call(1); \
    }

INLINE void decode_scores(const int64_t type, int64_t lanes, const float *q, float *scores, const void *const *keys,
                          int64_t count, int64_t width, const Prefetch *next)
{
#define SCORES(some) score_lanes(some, type, q + l * width, keys, count, width, scores + l * KEYS, l ? NULL : next)
    IN_PASSES(lanes, SCORES)
}

INLINE void decode_values(const int64_t type, int64_t lanes, const float *p, float *out, const void *const *values,
                          int64_t count, int64_t width, const Prefetch *next)
{
#define VALUES(some) value_lanes(some, type, p + l * KEYS, values, count, width, out + l * width, l ? NULL : next)
    IN_PASSES(lanes, VALUES)
}

INLINE void decode_score_q16(int64_t lanes, const int16_t *q, const float *scales, float *scores,
                             const void *const *keys, int64_t count, int64_t width, const Prefetch *next)
{
#define SCORES_Q16(some) \
    score_q16(some, q + l * width, scales + l, keys, count, width, scores + l * KEYS, l ? NULL : next)
    IN_PASSES(lanes, SCORES_Q16)
}

INLINE void decode_value_q16(int64_t lanes, const float *p, int16_t *q, float *out, const void *const *values,
                             int64_t count, int64_t width, const Prefetch *next)
{
    float scales[MAX_DECODE_LANES];
    for (int64_t l = 0; l < lanes; l++)
        scales[l] = quantise(q + l * KEYS, p + l * KEYS, KEYS, MAX_Q16);
#define VALUES_Q16(some) \
    value_q16(some, q + l * KEYS, scales + l, values, count, width, out + l * width, l ? NULL : next)
    IN_PASSES(lanes, VALUES_Q16)
}

INLINE void scales_of(float *restrict scales, const void *const *rows, int64_t d)
{
    for (int64_t i = 0; i < KEYS; i++)
        scales[i] = kv_scale(rows[i], d);
}

/* Multiplies scores [lanes][KEYS] with the scales of their int8 keys. */
INLINE void scale_scores(float *restrict x, const void *const *rows, int64_t lanes, int64_t d)
{
    float scales[KEYS];
    scales_of(scales, rows, d);
    for (int64_t l = 0; l < lanes; l++)
        for (int64_t i = 0; i < KEYS; i++)
            x[l * KEYS + i] *= scales[i];
}

/* Multiplies softmax weights [lanes][KEYS] with the scales of their int8 values. A weight of 0 stays 0, even if the
 * scale is not finite. */
INLINE void scale_weights(float *restrict x, const void *const *rows, int64_t lanes, int64_t d)
{
    float scales[KEYS];
    scales_of(scales, rows, d);
    for (int64_t l = 0; l < lanes; l++)
        for (int64_t i = 0; i < KEYS; i++)
            x[l * KEYS + i] = x[l * KEYS + i] == 0.0f ? 0.0f : x[l * KEYS + i] * scales[i];
}

static void decode(const Attention *a, const Item *item, float *scratch)
{
    int64_t width = a->width, d = a->config->head_dim, share = a->share, lanes = item->queries * share;
    int64_t type = d == width ? a->step->kv_type : F32;
    float *q = scratch, *out = q + MAX_DECODE_LANES * width, *scores = out + MAX_DECODE_LANES * width,
          *raw = scores + MAX_DECODE_LANES * KEYS;
    float *copies = raw + width, by_query[MAX_DECODE_LANES];
    int16_t *query_q16 = (int16_t *)copies, *weight_q16 = query_q16 + MAX_DECODE_LANES * width;
    int q16 = HAS_I16 && type == I8 && d <= LONGEST_SUM;
    Running runs[MAX_DECODE_LANES];
    const Item *after = item[1].sequence >= 0 ? item + 1 : NULL; /* probably the thread's next item */
    read_queries(a, item, q, raw, width, type);
    for (int64_t l = 0; q16 && l < lanes; l++)
        by_query[l] = quantise(query_q16 + l * width, q + l * width, d, MAX_Q16);
    memset(out, 0, (size_t)(lanes * width) * sizeof(float));
    for (int64_t l = 0; l < lanes; l++) {
        int64_t position = query_position(a, item, item->query + l / share);
        runs[l] = (Running){-INFINITY, 0, max(item->from, first_key(a, position)), min(item->to, position + 1)};
    }
    Prefetch rows;
    rows.bytes = kv_bytes(d, a->step->kv_type);
    find_rows(a, item, item->from, rows.keys, rows.values);
    for (int64_t key = item->from; key < item->to; key += KEYS) {
        const void *keys[KEYS], *values[KEYS];
        int64_t count = min(KEYS, item->to - key);
        const Prefetch *next = &rows;
        memcpy(keys, rows.keys, sizeof keys);
        memcpy(values, rows.values, sizeof values);
        if (key + KEYS < item->to)
            find_rows(a, item, key + KEYS, rows.keys, rows.values);
        else if (after)
            find_rows(a, after, after->from, rows.keys, rows.values);
        else
            next = NULL;
        if (d != width) {
            pad_rows(a, keys, copies, width);
            pad_rows(a, values, copies + KEYS * width, width);
        }
        if (type == BF16)
            decode_scores(BF16, lanes, q, scores, keys, count, width, next);
        else if (q16)
            decode_score_q16(lanes, query_q16, by_query, scores, keys, count, width, next);
        else if (type == I8)
            decode_scores(I8, lanes, q, scores, keys, count, width, next);
        else
            decode_scores(F32, lanes, q, scores, keys, count, width, next);
        if (type == I8)
            scale_scores(scores, keys, lanes, d);
        for (int64_t l = 0; l < lanes; l++)
            softmax_row(a, scores + l * KEYS, &runs[l], key, out + l * width, width);
        if (type == I8)
            scale_weights(scores, values, lanes, d);
        if (type == BF16)
            decode_values(BF16, lanes, scores, out, values, count, width, next);
        else if (q16)
            decode_value_q16(lanes, scores, weight_q16, out, values, count, width, next);
        else if (type == I8)
            decode_values(I8, lanes, scores, out, values, count, width, next);
        else
            decode_values(F32, lanes, scores, out, values, count, width, next);
    }
    for (int64_t l = 0; l < lanes; l++) {
        for (int64_t i = 0; i < d; i++)
            raw[i] = out[l * width + query_index(i, type)];
        if (item->part < 0) {
            write_row(a, item, l, raw, runs[l].total);
        } else {
            float *part = a->parts + (item->part * MAX_DECODE_LANES + l) * (width + 2);
            memcpy(part + 2, raw, (size_t)d * sizeof(float));
            part[0] = runs[l].peak;
            part[1] = runs[l].total;
        }
    }
}

#endif
