/* Attention of many queries: FlashAttention's tiling (Dao et al., 2022) with a query in each lane.
 *
 * Scores stand as [key][query], so the softmax runs down the lanes and nothing is transposed but the queries, once.
 * Keys and values are widened to floats; with native bf16 they stay pairs. */

#define QUERIES 64 /* lanes of an item: queries times the heads that share a key */
#define BANKS (QUERIES / PANEL)

typedef struct {
    float *q, *out; /* [BANKS][head_dim][PANEL]; q in words */
    float *keys, *values; /* a tile, in words: [KEYS][head_dim], or pairs */
    float *scores, *weights; /* [KEYS][PANEL]; weights in words */
    float *raw; /* [head_dim] */
    float peak[QUERIES], total[QUERIES];
    int32_t position[QUERIES];
} Tile;

INLINE int64_t prefill_scratch(int64_t d) { return 2 * BANKS * d * PANEL + 2 * KEYS * d + 2 * KEYS * PANEL + d; }

INLINE uint16_t *half(float *words, int64_t i) { return (uint16_t *)words + i; }

INLINE void read_lanes(const Attention *a, const Item *item, Tile *t, int pairs)
{
    int64_t share = a->share, d = a->kind->head_dim;
    memset(t->q, 0, (size_t)(BANKS * d * PANEL) * sizeof(float));
    for (int64_t l = 0; l < QUERIES; l++) {
        int64_t query = least(l / share, item->queries - 1), lane = l % PANEL;
        int64_t row = a->step->starts[item->sequence] + item->query + query;
        float *q = t->q + l / PANEL * d * PANEL;
        t->peak[l] = -INFINITY;
        t->total[l] = 0;
        t->position[l] = (int32_t)query_position(a, item, item->query + query);
        if (l >= item->queries * share)
            continue;
        widen(t->raw, at(a->q, row * a->ldq + (item->head * share + l % share) * d, a->step->type), d, a->step->type);
        for (int64_t i = 0; i < d; i++) {
            if (pairs)
                *half(q, i / 2 * (2 * PANEL) + lane * 2 + i % 2) = to_bf16(t->raw[i]);
            else
                q[i * PANEL + lane] = t->raw[i];
        }
    }
}

INLINE void read_tile(const Attention *a, const Item *item, int64_t key, int64_t count, Tile *t, int pairs)
{
    int64_t d = a->kind->head_dim;
    for (int64_t i = 0; i < count; i++) {
        const void *k = row_of(a, a->keys, item, key + i), *v = row_of(a, a->values, item, key + i);
        if (!pairs) {
            widen_kv(t->keys + i * d, k, d, a->step->kv_type);
            widen_kv(t->values + i * d, v, d, a->step->kv_type);
            continue;
        }
        memcpy(half(t->keys, i * d), k, (size_t)d * 2);
        uint32_t *restrict words = (uint32_t *)t->values + i / 2 * d;
        const uint16_t *row = v;
        if (i % 2)
            for (int64_t j = 0; j < d; j++)
                words[j] |= (uint32_t)row[j] << 16;
        else
            for (int64_t j = 0; j < d; j++)
                words[j] = row[j];
    }
}

INLINE void hide(const Attention *a, float *scores, int64_t key, int64_t count, const int32_t *position)
{
    for (int64_t i = 0; i < count; i++) {
        int32_t at_key = (int32_t)(key + i), oldest = a->kind->window > 0 ? (int32_t)least(a->kind->window, INT32_MAX) : INT32_MAX;
        for (int64_t l = 0; l < PANEL; l++) {
            int32_t behind = position[l] - at_key;
            scores[i * PANEL + l] = behind < 0 || behind >= oldest ? -INFINITY : scores[i * PANEL + l];
        }
    }
}

/* Scores [count][PANEL] into weights; returns through `fade` what the sums so far are to be multiplied by. */
INLINE void soften_lanes(float *restrict s, int64_t count, float *peak, float *total, float *fade)
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

/* One tile of keys for one bank of lanes. */
INLINE void attend_bank(const Attention *a, Tile *t, int64_t bank, int64_t key, int64_t count, int pairs)
{
    int64_t d = a->kind->head_dim, step = ROWS_FLOAT, word = pairs ? 2 : 1;
    float fade[PANEL], *out = t->out + bank * d * PANEL, *weights = pairs ? t->weights : t->scores;
    const int32_t *position = t->position + bank * PANEL;
    vf sums[ROWS_FLOAT * NV];
    for (int64_t i = 0; i < count; i += step) {
        int rows = (int)least(step, count - i);
        for (int j = 0; j < rows * NV; j++)
            sums[j] = vf_zero();
        words(rows, pairs, t->keys + i * d / word, d / word, 1, t->q + bank * d * PANEL, PANEL, d / word, sums);
        for (int j = 0; j < rows * NV; j++)
            vf_store(t->scores + i * PANEL + j * VF, vf_mul(sums[j], vf_set1(a->kind->scale)));
    }
    if (a->kind->softcap > 0)
        for (int64_t i = 0; i < count * PANEL; i++)
            t->scores[i] = a->kind->softcap * tanh_of(t->scores[i] / a->kind->softcap);
    if (a->kind->window > 0 || key + count - 1 > position[0])
        hide(a, t->scores, key, count, position);
    soften_lanes(t->scores, count, t->peak + bank * PANEL, t->total + bank * PANEL, fade);
    if (pairs)
        pair_weights(t, count);
    for (int64_t i = 0; i < d; i += step) {
        int rows = (int)least(step, d - i);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < NV; v++)
                sums[r * NV + v] = vf_mul(vf_load(out + (i + r) * PANEL + v * VF), vf_load(fade + v * VF));
        words(rows, pairs, t->values + i, 1, d, weights, PANEL, (count + word - 1) / word, sums);
        for (int j = 0; j < rows * NV; j++)
            vf_store(out + i * PANEL + j * VF, sums[j]);
    }
}

static void prefill(const Attention *a, const Item *item, float *scratch)
{
    int64_t d = a->kind->head_dim, lanes = item->queries * a->share;
    int64_t banks = (lanes + PANEL - 1) / PANEL, bank_size = d * PANEL;
    int pairs = 0;
#ifdef NATIVE_BF16
    pairs = a->step->kv_type == BF16 && a->step->type == BF16 && d % 2 == 0;
#endif
    Tile t;
    t.q = scratch;
    t.out = t.q + BANKS * bank_size;
    t.keys = t.out + BANKS * bank_size;
    t.values = t.keys + KEYS * d;
    t.scores = t.values + KEYS * d;
    t.weights = t.scores + KEYS * PANEL;
    t.raw = t.weights + KEYS * PANEL;
    memset(t.out, 0, (size_t)(BANKS * bank_size) * sizeof(float));
    read_lanes(a, item, &t, pairs);
    for (int64_t key = item->from; key < item->to; key += KEYS) {
        int64_t count = least(KEYS, item->to - key);
        read_tile(a, item, key, count, &t, pairs);
        for (int64_t bank = 0; bank < banks; bank++)
            attend_bank(a, &t, bank, key, count, pairs);
    }
    for (int64_t l = 0; l < lanes; l++) {
        const float *out = t.out + l / PANEL * bank_size + l % PANEL;
        for (int64_t i = 0; i < d; i++)
            t.raw[i] = out[i * PANEL];
        write_row(a, item, l, t.raw, t.total[l]);
    }
}
