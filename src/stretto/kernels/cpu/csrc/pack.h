/* Weights into panels and back. Quantisation searches each group's scale for the least squared error. */
#ifndef STRETTO_PACK_H
#define STRETTO_PACK_H

#include "pool.h"
#include "scalar.h"

#define SEARCH 6 /* scales tried on either side of the one that just holds the largest weight, for int4 */
#define LINE 16  /* words of a cache line */
#define BLOCK 64 /* of k, moved at once: 32 rows of it stay in the nearest cache */

typedef struct {
    const Weights *w;
    const void *source;
    int64_t type;
    uint8_t *data;
    float *out;
} Pack;

/* The nearest bf16 whose magnitude is not below. */
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

/* The bf16 scale of a group of int4 weights (levels -8 to 7); negative when the largest weight is positive, because
 * there is one level more below zero. */
INLINE float scale_of_4(const float *x, int64_t n)
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

INLINE float scale_of_8(const float *x, int64_t n)
{
    float peak = float_of(largest(x, n));
    return peak < 1e-30f ? 0 : bf16_above(peak / 127.0f);
}

INLINE int level_of(float x, float inverse, int low, int high)
{
    float q = x * inverse;
    q = q < (float)low ? (float)low : q;
    q = q > (float)high ? (float)high : q;
    return (int)rintf(q);
}

/* One row's group of weights as bytes: column `lane` of the panel. */
INLINE void pack_group(uint8_t *data, const float *x, int64_t lane, int64_t group, int64_t kind)
{
    float scale = kind == W_I8 ? scale_of_8(x, group) : scale_of_4(x, group);
    float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    ((uint16_t *)data)[lane] = to_bf16(scale);
    data += PANEL * 2 + lane * 4;
    for (int64_t k = 0; k < group; k++) {
        if (kind == W_I8)
            data[k / 4 * (PANEL * 4) + k % 4] = (uint8_t)(128 + level_of(x[k], inverse, -127, 127));
        else
            data[k / 8 * (PANEL * 4) + k % 4] |= (uint8_t)((8 + level_of(x[k], inverse, -8, 7)) << (k % 8 / 4 * 4));
    }
}

/* A whole panel that is kept as it is: PANEL rows of `count` words, a cache line of each at a time. */
INLINE void move_pairs(uint32_t *words, const void *rows, int64_t count)
{
    for (int64_t start = 0; start < count; start += LINE)
        for (int64_t i = start; i < min(start + LINE, count); i++)
            for (int64_t lane = 0; lane < PANEL; lane++)
                memcpy(words + i * PANEL + lane, (const uint8_t *)rows + (lane * count + i) * 4, 4);
}

/* Weights that are kept: a transposition, in words of one float or of two bf16. */
INLINE void pack_kept(const Pack *a, int64_t panel, uint32_t *words)
{
    const Weights *w = a->w;
    int64_t halves = w->format == W_BF16 ? 2 : 1, kp = padded_k(w->format, w->k);
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
    int64_t kp = padded_k(w->format, w->k), bytes = panel_bytes(w->format, w->k, w->group), group = w->group;
    uint8_t *data = a->data + panel * bytes;
    float *row = pool_private(thread);
    memset(data, 0, (size_t)bytes);
    if (w->format < W_I8) {
        pack_kept(a, panel, (uint32_t *)data);
        return;
    }
    memset(row, 0, (size_t)kp * sizeof(float));
    for (int64_t lane = 0; lane < min(PANEL, w->n - panel * PANEL); lane++) {
        widen(row, at(a->source, (panel * PANEL + lane) * w->k, a->type), w->k, a->type);
        for (int64_t g = 0; g < kp / group; g++)
            pack_group(data + g * (bytes / (kp / group)), row + g * group, lane, group, w->format);
    }
}

static void unpack_item(const void *job, int64_t panel, int thread)
{
    const Pack *a = job;
    const Weights *w = a->w;
    int64_t kp = padded_k(w->format, w->k), bytes = panel_bytes(w->format, w->k, w->group);
    int64_t group = w->format < W_I8 ? kp : w->group, group_bytes = bytes / (kp / group);
    const uint8_t *data = w->data + panel * bytes;
    (void)thread;
    for (int64_t lane = 0; lane < min(PANEL, w->n - panel * PANEL); lane++)
        for (int64_t k = 0; k < w->k; k++) {
            const uint8_t *of = data + k / group * group_bytes;
            int64_t j = k % group;
            float scale = w->format < W_I8 ? 1.0f : from_bf16(((const uint16_t *)of)[lane]), x;
            if (w->format == W_F32)
                x = ((const float *)of)[k * PANEL + lane];
            else if (w->format == W_BF16)
                x = from_bf16(((const uint16_t *)of)[k / 2 * (PANEL * 2) + lane * 2 + k % 2]);
            else if (w->format == W_I8)
                x = scale * (float)(of[PANEL * 2 + j / 4 * (PANEL * 4) + lane * 4 + j % 4] - 128);
            else
                x = scale * (float)((of[PANEL * 2 + j / 8 * (PANEL * 4) + lane * 4 + j % 4] >> (j % 8 / 4 * 4) & 15) - 8);
            a->out[(panel * PANEL + lane) * w->k + k] = x;
        }
}

INLINE int bad_weights(const Weights *w)
{
    int64_t kp = padded_k(w->format, w->k);
    if (w->n < 1 || w->k < 1 || w->format < W_F32 || w->format > W_I4)
        return 1;
    return w->format >= W_I8 && (w->k > MAX_K || w->group < 1 || kp % w->group || w->group % (w->format == W_I8 ? 4 : 8));
}

/* Weights [n, k], row-major, into panels at `data`. */
static int pack(const Weights *w, const void *source, int64_t type, uint8_t *data)
{
    Pack job = {w, source, type, data, NULL};
    if (bad_weights(w))
        return BAD_SHAPE;
    if (pool_reserve(0, (size_t)padded_k(w->format, w->k) * sizeof(float)))
        return NO_MEMORY;
    pool_run(pack_item, &job, (w->n + PANEL - 1) / PANEL);
    return OK;
}

/* Panels back into weights [n, k] in float32. */
static int unpack(const Weights *w, float *out)
{
    Pack job = {w, NULL, F32, NULL, out};
    if (bad_weights(w))
        return BAD_SHAPE;
    pool_run(unpack_item, &job, (w->n + PANEL - 1) / PANEL);
    return OK;
}

#endif
