/* Packs weights into panels, and unpacks them. For int4, the scale of each group is searched for the smallest squared
 * error. */
#ifndef STRETTO_PACK_H
#define STRETTO_PACK_H

#include "pool.h"
#include "scalar.h"

#define SEARCH 6 /* scales tried on either side of the one that maps the largest weight to the last value */
#define LINE 16 /* words of a cache line */
#define BLOCK 64 /* of k that are moved at once: 32 rows of it stay in the first cache */

typedef struct {
    const Weights *w;
    const void *source;
    int64_t type;
    uint8_t *data;
    float *out;
} Pack;

/* The nearest bf16 of at least this magnitude. */
INLINE float bf16_above(float x) { return float_of((bits_of(x) + 0xffff) & 0xffff0000u); }

INLINE float squared_error(const float *x, int64_t n, float scale, float low, float high)
{
    float error = 0, inverse = 1.0f / scale;
#pragma omp simd reduction(+ : error)
    for (int64_t i = 0; i < n; i++) {
        float q = (x[i] * inverse + ROUND) - ROUND;
        q = q < low ? low : q;
        q = q > high ? high : q;
        float off = x[i] - q * scale;
        error += off * off;
    }
    return error;
}

/* The scale of a group of 4-bit weights, -8 to 7. It is negative when the weight of largest magnitude is positive,
 * because there is one value more below zero than above. */
INLINE float scale_q4(const float *x, int64_t n)
{
    float peak = 0;
    for (int64_t i = 0; i < n; i++)
        peak = fabsf(x[i]) > fabsf(peak) ? x[i] : peak;
    if (fabsf(peak) < 1e-30f)
        return 0;
    float best = 0, smallest_error = INFINITY;
    for (int sign = -1; sign <= 1; sign += 2)
        for (int i = -SEARCH; i <= SEARCH; i++) {
            float scale = sign * peak / (8.0f + 0.2f * (float)i);
            scale = from_bf16(to_bf16(scale));
            float error = squared_error(x, n, scale, -8, 7);
            if (error < smallest_error) {
                smallest_error = error;
                best = scale;
            }
        }
    return best;
}

INLINE float scale_q8(const float *x, int64_t n)
{
    float peak = float_of(largest(x, n));
    return peak < 1e-30f ? 0 : bf16_above(peak / 127.0f);
}

INLINE int nearest(float x, float inverse, int low, int high)
{
    float q = x * inverse;
    q = q < (float)low ? (float)low : q;
    q = q > (float)high ? (float)high : q;
    return (int)rintf(q);
}

/* Quantises one row's group of weights and writes it into column `lane` of a panel that holds zeros: its scale, then
 * words, whose byte j % 4 holds weight j from bit j / 4 * bits on. */
INLINE void pack_group(const int bits, float scale, int low, int high, uint8_t *data, const float *x, int64_t lane,
                       int64_t group)
{
    const int per_word = 32 / bits, offset = 1 << (bits - 1);
    float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    ((uint16_t *)data)[lane] = to_bf16(scale);
    data += PANEL * 2 + lane * 4;
    for (int64_t k = 0; k < group; k++)
        data[k / per_word * (PANEL * 4) + k % 4] |=
            (uint8_t)((offset + nearest(x[k], inverse, low, high)) << (k % per_word / 4 * bits));
}

static void pack_q8(uint8_t *data, const float *x, int64_t lane, int64_t group)
{
    pack_group(8, scale_q8(x, group), -127, 127, data, x, lane, group);
}

static void pack_q4(uint8_t *data, const float *x, int64_t lane, int64_t group)
{
    pack_group(4, scale_q4(x, group), -8, 7, data, x, lane, group);
}

/* By quantised format. */
static void (*const PACK_GROUP[])(uint8_t *data, const float *x, int64_t lane, int64_t group) = {
    [W_I8] = pack_q8,
    [W_I4] = pack_q4,
};

/* Transposes a whole panel, PANEL rows of `count` words, a cache line of each row at a time. */
INLINE void move_pairs(uint32_t *words, const void *rows, int64_t count)
{
    for (int64_t start = 0; start < count; start += LINE)
        for (int64_t i = start; i < min(start + LINE, count); i++)
            for (int64_t lane = 0; lane < PANEL; lane++)
                memcpy(words + i * PANEL + lane, (const uint8_t *)rows + (lane * count + i) * 4, 4);
}

/* Packs float weights: a transposition in words of one float or of two bf16. */
INLINE void pack_kept(const Pack *a, int64_t panel, uint32_t *words)
{
    const Weights *w = a->w;
    int64_t halves = format_of(w)->per_word, kp = padded_k(w);
    float block[BLOCK];
    uint32_t line[BLOCK];
    if (halves == 2 && a->type == BF16 && w->k % 2 == 0 && (panel + 1) * PANEL <= w->n) {
        move_pairs(words, at(a->source, panel * PANEL * w->k, a->type), w->k / 2);
        memset(words + w->k / 2 * PANEL, 0, (size_t)(kp - w->k) / 2 * PANEL * sizeof *words);
        return;
    }
    for (int64_t k = 0; k < kp; k += BLOCK)
        for (int64_t lane = 0; lane < min(PANEL, w->n - panel * PANEL); lane++) {
            int64_t count = min(BLOCK, w->k - k);
            memset(block, 0, sizeof block);
            widen(block, at(a->source, (panel * PANEL + lane) * w->k + k, a->type), count, a->type);
            if (halves == 2)
                narrow(line, block, BLOCK, BF16);
            else
                memcpy(line, block, sizeof line);
            for (int64_t i = 0; i < min(BLOCK, kp - k) / halves; i++)
                words[(k / halves + i) * PANEL + lane] = line[i];
        }
}

static void pack_item(const void *job, int64_t panel, int thread)
{
    const Pack *a = job;
    const Weights *w = a->w;
    int64_t kp = padded_k(w), bytes = panel_bytes(w);
    uint8_t *data = a->data + panel * bytes;
    float *row = pool_private(thread);
    memset(data, 0, (size_t)bytes);
    if (!format_of(w)->quantised) {
        pack_kept(a, panel, (uint32_t *)data);
        return;
    }
    int64_t groups = kp / w->group;
    memset(row, 0, (size_t)kp * sizeof(float));
    for (int64_t lane = 0; lane < min(PANEL, w->n - panel * PANEL); lane++) {
        widen(row, at(a->source, (panel * PANEL + lane) * w->k, a->type), w->k, a->type);
        for (int64_t g = 0; g < groups; g++)
            PACK_GROUP[w->format](data + g * (bytes / groups), row + g * w->group, lane, w->group);
    }
}

/* Weight k of a row in column `lane` of a panel. */
INLINE float unpacked(const Weights *w, const uint8_t *panel, int64_t lane, int64_t k)
{
    int64_t per_word = format_of(w)->per_word, bits = 32 / per_word;
    if (w->format == W_F32)
        return ((const float *)panel)[k * PANEL + lane];
    if (w->format == W_BF16)
        return from_bf16(((const uint16_t *)panel)[k / 2 * (PANEL * 2) + lane * 2 + k % 2]);
    const uint8_t *group = panel + k / w->group * (PANEL * 2 + w->group / per_word * PANEL * 4);
    int64_t j = k % w->group;
    int q = group[PANEL * 2 + j / per_word * (PANEL * 4) + lane * 4 + j % 4] >> (j % per_word / 4 * bits);
    return from_bf16(((const uint16_t *)group)[lane]) * (float)((q & ((1 << bits) - 1)) - (1 << (bits - 1)));
}

static void unpack_item(const void *job, int64_t panel, int thread)
{
    const Pack *a = job;
    const Weights *w = a->w;
    const uint8_t *data = w->data + panel * panel_bytes(w);
    (void)thread;
    for (int64_t lane = 0; lane < min(PANEL, w->n - panel * PANEL); lane++)
        for (int64_t k = 0; k < w->k; k++)
            a->out[(panel * PANEL + lane) * w->k + k] = unpacked(w, data, lane, k);
}

INLINE int bad_weights(const Weights *w)
{
    if (w->n < 1 || w->k < 1 || w->format < W_F32 || w->format > W_I4)
        return 1;
    return format_of(w)->quantised
        && (w->k > MAX_K || w->group < 1 || padded_k(w) % w->group || w->group % format_of(w)->per_word);
}

/* Packs weights [n, k], row-major, into panels at `data`. */
static int pack(const Weights *w, const void *source, int64_t type, uint8_t *data)
{
    Pack job = {w, source, type, data, NULL};
    if (bad_weights(w))
        return BAD_SHAPE;
    if (pool_reserve(0, (size_t)padded_k(w) * sizeof(float)))
        return NO_MEMORY;
    pool_run(pack_item, &job, (w->n + PANEL - 1) / PANEL);
    return OK;
}

/* Unpacks panels into weights [n, k] in float32. */
static int unpack(const Weights *w, float *out)
{
    Pack job = {w, NULL, F32, NULL, out};
    if (bad_weights(w))
        return BAD_SHAPE;
    pool_run(unpack_item, &job, (w->n + PANEL - 1) / PANEL);
    return OK;
}

#endif
