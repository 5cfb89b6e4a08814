/* Attention of many queries: FlashAttention's tiling (Dao et al., 2022), with a query in each vector lane.
 *
 * Scores are stored as [key][query], so the softmax needs no sums across lanes, and only the queries are transposed.
 * Keys and values are widened to floats. With native bf16 products they stay pairs of bf16. With an int8 cache, queries
 * and softmax weights are quantised to 16 bits and multiplied as integers, which doubles the products of a cycle. Each
 * query has a scale; softmax weights have one for each lane and tile. Sums stay below 32767 * 127 * 512 < 2^31. */
#ifndef STRETTO_PREFILL_H
#define STRETTO_PREFILL_H

#include "decode.h"
#include "gemm.h"
#include "scalar.h"

#define QUERIES 128 /* lanes of an item: queries times the heads that share a key */
#define BANKS (QUERIES / PANEL)

typedef struct {
    float *q, *out; /* [BANKS][head_dim][PANEL]; q in words */
    float *keys, *values; /* a tile, in words: [KEYS][head_dim], or pairs */
    float *scores, *weights; /* [KEYS][PANEL]; weights in words */
    float *raw; /* [head_dim] */
    int word; /* SINGLE, PAIR_BF16 or PAIR_I16 */
    float by_query[QUERIES], by_key[KEYS], by_value[KEYS]; /* scales of quantised values */
    float peak[QUERIES], total[QUERIES];
    int32_t position[QUERIES];
} Tile;

INLINE int64_t prefill_scratch(int64_t d) { return 2 * BANKS * d * PANEL + 2 * KEYS * d + 2 * KEYS * PANEL + d; }

INLINE uint16_t *half(float *words, int64_t i) { return (uint16_t *)words + i; }

/* Writes one query into its lane, as words. */
INLINE void read_lane(const Attention *a, Tile *t, float *q, int64_t l)
{
    int64_t d = a->config->head_dim;
    if (t->word == SINGLE) {
        for (int64_t i = 0; i < d; i++)
            q[i * PANEL] = t->raw[i];
        return;
    }
    uint16_t pairs[LONGEST_SUM];
    uint32_t *words = (uint32_t *)q;
    if (t->word == PAIR_BF16)
        narrow(pairs, t->raw, d, BF16);
    else
        t->by_query[l] = quantise((int16_t *)pairs, t->raw, d, MAX_Q16) * a->config->scale;
    for (int64_t i = 0; i < d / 2; i++)
        memcpy(words + i * PANEL, pairs + 2 * i, sizeof *words);
}

INLINE void read_lanes(const Attention *a, const Item *item, Tile *t)
{
    int64_t share = a->share, d = a->config->head_dim, lanes = item->queries * share;
    if (lanes % PANEL)
        memset(t->q + lanes / PANEL * d * PANEL, 0, (size_t)(d * PANEL) * sizeof(float));
    for (int64_t l = 0; l < QUERIES; l++) {
        int64_t query = min(l / share, item->queries - 1);
        t->peak[l] = -INFINITY;
        t->total[l] = t->by_query[l] = 0;
        t->position[l] = (int32_t)query_position(a, item, item->query + query);
    }
    for (int64_t l = 0; l < lanes; l++) {
        int64_t row = a->step->starts[item->sequence] + item->query + l / share;
        widen(t->raw, at(a->q, row * a->ldq + (item->head * share + l % share) * d, a->step->type), d, a->step->type);
        read_lane(a, t, t->q + l / PANEL * d * PANEL + l % PANEL, l);
    }
}

/* Interleaves two rows of values, whose products with two weights are then added. `odd` is NULL behind the last row. */
INLINE void pair_halves(uint32_t *restrict words, const uint16_t *even, const uint16_t *odd, int64_t d)
{
    for (int64_t i = 0; i < d; i++)
        words[i] = even[i] | (odd ? (uint32_t)odd[i] << 16 : 0);
}

INLINE void pair_q8(uint32_t *restrict words, const int8_t *even, const int8_t *odd, int64_t d)
{
    for (int64_t i = 0; i < d; i++)
        words[i] = (uint16_t)even[i] | (odd ? (uint32_t)odd[i] << 16 : 0);
}

INLINE void widen_q8(int16_t *restrict y, const int8_t *restrict x, int64_t d)
{
    for (int64_t i = 0; i < d; i++)
        y[i] = x[i];
}

INLINE void read_tile(const Attention *a, const Item *item, int64_t key, int64_t count, Tile *t)
{
    int64_t d = a->config->head_dim;
    const void *keys[KEYS], *values[KEYS];
    find_rows(a, item, key, keys, values);
    for (int64_t i = 0; i < count; i++) {
        uint32_t *words = (uint32_t *)t->values + i / 2 * d;
        const void *next = i + 1 < count ? values[i + 1] : NULL;
        if (t->word == SINGLE) {
            widen_kv(t->keys + i * d, keys[i], d, a->step->kv_type);
            widen_kv(t->values + i * d, values[i], d, a->step->kv_type);
        } else if (t->word == PAIR_BF16) {
            memcpy(half(t->keys, i * d), keys[i], (size_t)d * 2);
            if (i % 2 == 0)
                pair_halves(words, values[i], next, d);
        } else {
            t->by_key[i] = kv_scale(keys[i], d);
            t->by_value[i] = kv_scale(values[i], d);
            widen_q8((int16_t *)half(t->keys, i * d), keys[i], d);
            if (i % 2 == 0)
                pair_q8(words, values[i], next, d);
        }
    }
}

INLINE void mask(const Attention *a, float *scores, int64_t key, int64_t count, const int32_t *position)
{
    for (int64_t i = 0; i < count; i++) {
        int32_t at_key = (int32_t)(key + i),
                oldest = a->config->window > 0 ? (int32_t)min(a->config->window, INT32_MAX) : INT32_MAX;
        for (int64_t l = 0; l < PANEL; l++) {
            int32_t behind = position[l] - at_key;
            scores[i * PANEL + l] = behind < 0 || behind >= oldest ? -INFINITY : scores[i * PANEL + l];
        }
    }
}

/* Turns scores [count][PANEL] into softmax weights. `fade` receives the factor for the sums so far. */
INLINE void softmax_lanes(float *restrict s, int64_t count, float *peak, float *total, float *fade)
{
    float shift[PANEL], sum[PANEL];
    for (int64_t l = 0; l < PANEL; l++) {
        shift[l] = peak[l];
        sum[l] = 0;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t l = 0; l < PANEL; l++)
            shift[l] = s[i * PANEL + l] > shift[l] ? s[i * PANEL + l] : shift[l];
    for (int64_t l = 0; l < PANEL; l++) {
        float highest = shift[l];
        shift[l] = highest == -INFINITY ? 0.0f : highest;
        fade[l] = exp_below(peak[l] - shift[l]);
        peak[l] = highest;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t l = 0; l < PANEL; l++) {
            float weight = exp_below(s[i * PANEL + l] - shift[l]);
            s[i * PANEL + l] = weight;
            sum[l] += weight;
        }
    for (int64_t l = 0; l < PANEL; l++)
        total[l] = total[l] * fade[l] + sum[l];
}

INLINE void pair_weights(Tile *t, int64_t count)
{
    if (count % 2)
        memset(t->scores + count * PANEL, 0, PANEL * sizeof(float));
    for (int64_t i = 0; i < (count + 1) / 2; i++) {
        uint32_t *restrict to = (uint32_t *)t->weights + i * PANEL;
        const float *even = t->scores + 2 * i * PANEL, *odd = even + PANEL;
        for (int64_t l = 0; l < PANEL; l++)
            to[l] = to_bf16(even[l]) | (uint32_t)to_bf16(odd[l]) << 16;
    }
}

/* Multiplies the softmax weights of a tile with the scales of their values and quantises them to pairs of 16 bits.
 * `unit` receives the scale of each lane. A value that is not finite makes the queries that see it NaN. */
INLINE void quantise_weights(Tile *t, int64_t count, float *restrict total, float *restrict unit)
{
    float top[PANEL] = {0}, inverse[PANEL];
    for (int64_t i = 0; i < count; i++) {
        float *restrict weights = t->scores + i * PANEL, scale = t->by_value[i];
        if (!(scale < INFINITY)) {
            for (int64_t l = 0; l < PANEL; l++)
                total[l] = weights[l] > 0 ? NAN : total[l];
            scale = 0;
        }
        for (int64_t l = 0; l < PANEL; l++) {
            weights[l] = weights[l] > 0 ? weights[l] * scale : 0.0f;
            top[l] = weights[l] > top[l] ? weights[l] : top[l];
        }
    }
    if (count % 2)
        memset(t->scores + count * PANEL, 0, PANEL * sizeof(float));
    for (int64_t l = 0; l < PANEL; l++) {
        inverse[l] = top[l] > 1e-30f ? MAX_Q16 / top[l] : 0.0f;
        unit[l] = top[l] / MAX_Q16;
    }
    for (int64_t i = 0; i < (count + 1) / 2; i++) {
        uint32_t *restrict to = (uint32_t *)t->weights + i * PANEL;
        const float *even = t->scores + 2 * i * PANEL, *odd = even + PANEL;
        for (int64_t l = 0; l < PANEL; l++)
            to[l] = (uint32_t)(int32_t)(even[l] * inverse[l] + 0.5f)
                  | (uint32_t)(int32_t)(odd[l] * inverse[l] + 0.5f) << 16;
    }
}

/* The softmax of a tile alone, and then of it and the tiles before. `fade` receives the factor for the sums so far,
 * `gain` that for the sums of the tile. */
INLINE void softmax_q16(Tile *t, int64_t count, int64_t bank, float *fade, float *gain)
{
    float peak[PANEL], total[PANEL], *before = t->peak + bank * PANEL, *sum = t->total + bank * PANEL;
    for (int64_t l = 0; l < PANEL; l++) {
        peak[l] = -INFINITY;
        total[l] = 0;
    }
    softmax_lanes(t->scores, count, peak, total, fade);
    quantise_weights(t, count, total, gain);
    for (int64_t l = 0; l < PANEL; l++) {
        float highest = peak[l] > before[l] ? peak[l] : before[l], shift = highest == -INFINITY ? 0.0f : highest;
        float of_tile = exp_below(peak[l] - shift);
        fade[l] = exp_below(before[l] - shift);
        gain[l] *= of_tile;
        sum[l] = sum[l] * fade[l] + total[l] * of_tile;
        before[l] = highest;
    }
}

/* Attention of one bank of lanes over one tile of keys. `fresh`: it is their first tile. */
INLINE void attend_bank(const Attention *a, Tile *t, int64_t bank, int64_t key, int64_t count, int fresh)
{
    int64_t d = a->config->head_dim, step = ROWS_FLOAT, word = t->word == SINGLE ? 1 : 2;
    int q16 = t->word == PAIR_I16;
    float fade[PANEL], gain[PANEL], *out = t->out + bank * d * PANEL;
    float *weights = t->word == SINGLE ? t->scores : t->weights;
    const float *by_query = t->by_query + bank * PANEL;
    const int32_t *position = t->position + bank * PANEL;
    vf sums[ROWS_FLOAT * NV];
    count = min(count, position[PANEL - 1] + 1 - key);
    for (int64_t i = 0; i < count; i += step) {
        int rows = (int)min(step, count - i);
        words(rows, t->word, t->keys + i * d / word, d / word, 1, t->q + bank * d * PANEL, PANEL, d / word, 1, sums);
        for (int j = 0; j < rows * NV; j++) {
            vf scale = q16 ? vf_mul(vf_load(by_query + j % NV * VF), vf_set1(t->by_key[i + j / NV]))
                           : vf_set1(a->config->scale);
            vf_store(t->scores + i * PANEL + j * VF, vf_mul(q16 ? vf_from(vi_bits(sums[j])) : sums[j], scale));
        }
    }
    if (count <= 0)
        return;
    if (a->config->softcap > 0)
        for (int64_t i = 0; i < count * PANEL; i++)
            t->scores[i] = a->config->softcap * tanh_of(t->scores[i] / a->config->softcap);
    if (a->config->window > 0 || key + count - 1 > position[0])
        mask(a, t->scores, key, count, position);
    if (q16)
        softmax_q16(t, count, bank, fade, gain);
    else
        softmax_lanes(t->scores, count, t->peak + bank * PANEL, t->total + bank * PANEL, fade);
    if (t->word == PAIR_BF16)
        pair_weights(t, count);
    for (int64_t i = 0; i < d; i += step) {
        int rows = (int)min(step, d - i);
        if (!q16 && !fresh)
            for (int j = 0; j < rows * NV; j++)
                sums[j] = vf_mul(vf_load(out + i * PANEL + j * VF), vf_load(fade + j % NV * VF));
        words(rows, t->word, t->values + i, 1, d, weights, PANEL, (count + word - 1) / word, q16 || fresh, sums);
        for (int j = 0; j < rows * NV; j++) {
            float *sum = out + i * PANEL + j * VF;
            if (q16) {
                vf before = fresh ? vf_zero() : vf_mul(vf_load(sum), vf_load(fade + j % NV * VF));
                sums[j] = vf_fma(vf_from(vi_bits(sums[j])), vf_load(gain + j % NV * VF), before);
            }
            vf_store(sum, sums[j]);
        }
    }
}

static void prefill(const Attention *a, const Item *item, float *scratch)
{
    int64_t d = a->config->head_dim, lanes = item->queries * a->share;
    int64_t banks = (lanes + PANEL - 1) / PANEL, bank_size = d * PANEL;
    Tile t;
    t.word = SINGLE;
    if (d % 2 == 0 && d <= LONGEST_SUM) {
        if (HAS_BF16 && a->step->kv_type == BF16 && a->step->type == BF16)
            t.word = PAIR_BF16;
        if (HAS_I16 && a->step->kv_type == I8)
            t.word = PAIR_I16;
    }
    t.q = scratch;
    t.out = t.q + BANKS * bank_size;
    t.keys = t.out + BANKS * bank_size;
    t.values = t.keys + KEYS * d;
    t.scores = t.values + KEYS * d;
    t.weights = t.scores + KEYS * PANEL;
    t.raw = t.weights + KEYS * PANEL;
    read_lanes(a, item, &t);
    for (int64_t key = item->from; key < item->to; key += KEYS) {
        int64_t count = min(KEYS, item->to - key);
        read_tile(a, item, key, count, &t);
        for (int64_t bank = 0; bank < banks; bank++)
            attend_bank(a, &t, bank, key, count, key == item->from);
    }
    for (int64_t l = 0; l < lanes; l++) {
        const float *out = t.out + l / PANEL * bank_size + l % PANEL;
        for (int64_t i = 0; i < d; i++)
            t.raw[i] = out[i * PANEL];
        write_row(a, item, l, t.raw, t.total[l]);
    }
}

#endif
