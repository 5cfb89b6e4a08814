/* Paged attention of a step: splits it into items of similar work and runs them. */
#ifndef STRETTO_ATTEND_H
#define STRETTO_ATTEND_H

#include "decode.h"
#include "pool.h"
#include "prefill.h"
#include "rows.h"

#define PART_KEYS 256 /* fewer keys are not worth a part of their own */
#define PARTS_PER_THREAD 4

static void attention_item(const void *job, int64_t number, int thread)
{
    const Attention *a = job;
    const Item *item = &a->items[number];
    if (item->queries * a->share <= MAX_DECODE_LANES)
        decode(a, item, pool_private(thread));
    else
        prefill(a, item, pool_private(thread));
}

/* Merges the parts of one head of one sequence, which follow each other in `items`. The first item does it. */
static void merge_item(const void *job, int64_t number, int thread)
{
    const Attention *a = job;
    const Item *item = &a->items[number];
    int64_t d = a->config->head_dim, stride = MAX_DECODE_LANES * (a->width + 2), parts = 1;
    float *sums = pool_private(thread);
    while (item[parts].part > item->part && item[parts].head == item->head && item[parts].sequence == item->sequence)
        parts++;
    if (item->part < 0
        || (number > 0 && item[-1].part >= 0 && item[-1].head == item->head && item[-1].sequence == item->sequence))
        return;
    for (int64_t l = 0; l < item->queries * a->share; l++) {
        const float *part = a->parts + item->part * stride + l * (a->width + 2);
        float peak = -INFINITY, total = 0;
        for (int64_t p = 0; p < parts; p++)
            peak = part[p * stride] > peak ? part[p * stride] : peak;
        memset(sums, 0, (size_t)d * sizeof(float));
        for (int64_t p = 0; p < parts; p++) {
            const float *of = part + p * stride;
            float weight = exp_below(of[0] - (peak == -INFINITY ? 0.0f : peak));
            total += weight * of[1];
            for (int64_t i = 0; i < d; i++)
                sums[i] += weight * of[2 + i];
        }
        write_row(a, item, l, sums, total);
    }
}

/* Lists the items of a step and returns how many there are. Counts them alone when `items` is NULL. `parts` receives
 * the number of partial results. */
static int64_t split_work(const Attention *a, int64_t part_keys, Item *items, int64_t *parts)
{
    int64_t count = 0, share = a->share;
    *parts = 0;
    for (int64_t s = 0; s < a->step->sequences; s++) {
        int64_t queries = a->step->starts[s + 1] - a->step->starts[s], past = a->step->contexts[s] - queries;
        int64_t each = queries * share <= MAX_DECODE_LANES ? queries : max(1, QUERIES / share);
        for (int64_t head = 0; head < a->config->kv_heads; head++)
            for (int64_t q = 0; q < queries; q += each) {
                int64_t some = min(each, queries - q), from = first_key(a, past + q), to = past + q + some;
                int64_t pieces =
                    some * share <= MAX_DECODE_LANES && each == queries ? max(1, (to - from) / part_keys) : 1;
                for (int64_t p = 0; p < pieces; p++, count++)
                    if (items)
                        items[count] = (Item){
                            .sequence = s,
                            .head = head,
                            .query = q,
                            .queries = some,
                            .from = from + (to - from) * p / pieces,
                            .to = from + (to - from) * (p + 1) / pieces,
                            .part = pieces > 1 ? (*parts)++ : -1,
                        };
                    else
                        *parts += pieces > 1;
            }
    }
    return count;
}

/* Causal attention: a query sees the keys of its sequence up to its own. q is [tokens, heads, head_dim], with `ldq`
 * elements from token to token; out is [tokens, heads * head_dim]. */
static int paged_attention(const Step *step, const AttentionConfig *config, const void *q, int64_t ldq,
                           const void *cache, void *out)
{
    int64_t keys = 0, parts, width = round_up(config->head_dim, SPAN);
    Attention job = {
        .step = step,
        .config = config,
        .q = q,
        .keys = cache,
        .values = (const char *)cache + values_offset(step, config),
        .out = out,
        .ldq = ldq,
        .share = config->heads / config->kv_heads,
        .width = width,
    };
    if (config->heads % config->kv_heads || job.share > QUERIES)
        return BAD_SHAPE;
    for (int64_t s = 0; s < step->sequences; s++)
        keys += config->window > 0 ? min(config->window, step->contexts[s]) : step->contexts[s];
    int64_t part_keys = max(PART_KEYS, keys * config->kv_heads / (PARTS_PER_THREAD * pool_threads()));
    if (pool_threads() == 1)
        part_keys = INT64_MAX;
    int64_t count = split_work(&job, part_keys, NULL, &parts);
    size_t list = (size_t)round_up((count + 1) * (int64_t)sizeof(Item), 64);
    size_t own = (size_t)max(decode_scratch(width), prefill_scratch(config->head_dim)) * sizeof(float);
    if (pool_reserve(list + (size_t)(parts * MAX_DECODE_LANES * (width + 2)) * sizeof(float), own))
        return NO_MEMORY;
    Item *items = pool_shared();
    split_work(&job, part_keys, items, &parts);
    items[count] = (Item){-1, -1, 0, 0, 0, 0, -1};
    job.items = items;
    job.parts = (float *)((char *)items + list);
    pool_run(attention_item, &job, count);
    if (parts)
        pool_run(merge_item, &job, count);
    return OK;
}

#endif
