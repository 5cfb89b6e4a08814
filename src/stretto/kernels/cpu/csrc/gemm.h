/* y = x W^T + bias over packed panels.
 *
 * One row of x streams the weights once, so memory sets the pace; more rows share each panel while it is in cache.
 * Integer kinds take weights unsigned (offset by 128 or 8) and activations signed, quantised here per row and group
 * of k, to 16 bits where a level multiplies those anyway; the offset is taken back by what each sum starts at. A row
 * holding NaN or infinity in a group gives NaN in that row of y and touches no other.
 *
 * Quantised x stands in words, those of the rows of a tile side by side: a word meets the word of each output's
 * weights that a level's `vi_split` makes of a packed one. */
#ifndef STRETTO_GEMM_H
#define STRETTO_GEMM_H

#include "pack.h"
#include "pool.h"
#include "rows.h"
#include "scalar.h"

#define CACHE_BYTES 262144 /* of x that is kept at hand while all panels pass by */
#define ITEM_BYTES 16384 /* of weights: a turn that is worth taking */
#define TILES_SPLIT 4 /* more tiles of x than this share a panel's splitting; fewer each split as they go */
#define PREFETCH_BYTES 2048 /* bytes of weights asked for before their use: the hardware foresees nothing beyond a page */

typedef struct {
    const Weights *w;
    const void *x; /* as the tiles read it: float or bf16 pairs [m, kp], or words [tiles, words, rows] */
    const float *scales; /* of quantised x [tiles, groups, rows] */
    const int32_t *starts; /* what an integer sum starts at [tiles, spans, rows] */
    void *y;
    const void *source;
    int64_t m, type, kp, groups, panel; /* panel: bytes */
    int64_t rows, tiles, block; /* rows of a tile, tiles in all, tiles per block of x */
    int64_t span, words; /* k summed as integers before they become floats; words of a row of x */
    int64_t panels, chunk, chunks; /* panels in all, panels per item, items per block */
    int to_pairs;
} Linear;

INLINE int64_t parts_of(int64_t kind) { return kind == W_I4 ? 2 : PARTS_I8; }

/* Each sum has a name of its own: the compiler would keep an array of them in memory. */
#define EACH_SLOT(CASE) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)

/* For a step of k of a panel. */
INLINE void prefetch_ahead(const uint8_t *data)
{
    UNROLL
    for (int line = 0; line < PANEL * 4; line += 64)
        __builtin_prefetch(data + PREFETCH_BYTES + line);
}

/* Integer weights, packed (apart = 0) or already split (apart = 1): two vectors of the panel from `from` on, or four
 * when `wide`, which stand in the slots of further rows. */
INLINE void tile_integers(const int rows, const int wide, const int kind, const int apart, const Linear *a,
                          const uint8_t *panel, int64_t tile, const int from, vf *out)
{
    const int parts = kind == W_I4 ? 2 : PARTS_I8, each = kind == W_I4 ? 8 : 4, slots = wide ? 2 * rows : rows;
    const int stride = PANEL * 4 * (apart ? parts : 1), vectors = wide ? 4 : 2;
    int64_t groups = a->groups, spans = a->w->group / a->span, steps = a->span / each;
    const int32_t *x = (const int32_t *)a->x + tile * a->words * rows;
    const float *scales = a->scales + tile * groups * rows;
    const int32_t *starts = a->starts + tile * groups * spans * rows;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            out[r * NV + from + v] = vf_zero();
    for (int64_t g = 0; g < groups; g++, scales += rows) {
        const uint8_t *data = panel + PANEL * 2 + from * VF * 4;
        for (int64_t s = 0; s < spans; s++, starts += rows) {
            vi low0, low1, low2, low3, low4, low5, low6, low7, high0, high1, high2, high3, high4, high5, high6, high7;
#define START(n) low##n = high##n = vi_set1(n < slots ? starts[n % rows] : 0);
            EACH_SLOT(START)
            for (int64_t k = 0; k < steps; k++, data += stride) {
                if (!apart && from == 0)
                    prefetch_ahead(data);
                UNROLL
                for (int part = 0; part < parts; part++, x += rows) {
                    vi weights[4];
                    UNROLL
                    for (int v = 0; v < vectors; v++)
                        weights[v] = apart ? vi_load(data + part * PANEL * 4 + v * VF * 4)
                                           : vi_split(kind, vi_load(data + v * VF * 4), part);
#define SUM(n) \
    if (n < slots) { \
        vi word = vi_set1(x[n % rows]); \
        low##n = vi_dot(kind, low##n, weights[n < rows ? 0 : 2], word); \
        high##n = vi_dot(kind, high##n, weights[n < rows ? 1 : 3], word); \
    }
                    EACH_SLOT(SUM)
                }
            }
            const uint16_t *by_weight = (const uint16_t *)panel + from * VF;
#define SCALE(n) \
    if (n < slots) { \
        vf *sum = out + n % rows * NV + from + n / rows * 2, by_row = vf_set1(scales[n % rows]); \
        const uint16_t *by = by_weight + n / rows * 2 * VF; \
        sum[0] = vf_fma(vf_from(vi_total(kind, low##n)), vf_mul(vf_bf16(by), by_row), sum[0]); \
        sum[1] = vf_fma(vf_from(vi_total(kind, high##n)), vf_mul(vf_bf16(by + VF), by_row), sum[1]); \
    }
            EACH_SLOT(SCALE)
        }
        panel = data - from * VF * 4;
    }
}

/* A whole panel, in as few passes as the registers allow. */
INLINE void tile_panel(const int rows, const int kind, const int apart, const Linear *a, const uint8_t *panel,
                       int64_t tile, vf *out)
{
    const int wide = rows <= ROWS_WIDE;
    UNROLL
    for (int from = 0; from < NV; from += wide ? 4 : 2)
        tile_integers(rows, wide, kind, apart, a, panel, tile, from, out);
}

/* Weights in bf16 pairs of k, x in float: vectors as in tile_integers. */
INLINE void tile_pairs(const int rows, const int wide, const Linear *a, const uint8_t *panel, int64_t row,
                       const int from, vf *out)
{
    const int slots = wide ? 2 * rows : rows, vectors = wide ? 4 : 2;
    const float *x = (const float *)a->x + row * a->kp;
    const uint8_t *data = panel + from * VF * 4;
    int64_t kp = a->kp;
    vf low0, low1, low2, low3, low4, low5, low6, low7, high0, high1, high2, high3, high4, high5, high6, high7;
#define ZERO(n) low##n = high##n = vf_zero();
    EACH_SLOT(ZERO)
    for (int64_t k = 0; k < kp; k += 2, data += PANEL * 4)
        UNROLL
        for (int odd = 0; odd < 2; odd++) {
            vf weights[4];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                vi pairs = vi_load(data + v * VF * 4);
                weights[v] = odd ? vf_odd(pairs) : vf_even(pairs);
            }
#define SUM_HALF(n) \
    if (n < slots) { \
        vf word = vf_set1(x[n % rows * kp + k + odd]); \
        low##n = vf_sum(weights[n < rows ? 0 : 2], word, low##n); \
        high##n = vf_sum(weights[n < rows ? 1 : 3], word, high##n); \
    }
            EACH_SLOT(SUM_HALF)
        }
#define KEEP(n) \
    if (n < slots) { \
        out[n % rows * NV + from + n / rows * 2] = low##n; \
        out[n % rows * NV + from + n / rows * 2 + 1] = high##n; \
    }
    EACH_SLOT(KEEP)
}

/* What a word holds: a float, or two numbers whose products are added. */
enum { SINGLE, PAIR_BF16, PAIR_I16 };

INLINE vf word_sum(const int kind, vf sum, vf a, vf b)
{
    return kind == PAIR_BF16 ? vf_dot_pairs(sum, a, b) : kind == PAIR_I16 ? vf_dot_i16(sum, a, b) : vf_sum(a, b, sum);
}

/* sums[r][PANEL] += (when `fresh`: =) sum over k of a[r * by_row + k * by_k] * b[k * ldb + 0..PANEL), all in words of a
 * kind; sums of PAIR_I16 are 32-bit integers. Vectors as in tile_integers. */
INLINE void tile_words(const int rows, const int wide, const int kind, const float *a, int64_t by_row, int64_t by_k,
                       const float *b, int64_t ldb, int64_t k, int fresh, const int from, vf *sums)
{
    const int slots = wide ? 2 * rows : rows, vectors = wide ? 4 : 2;
    vf low0, low1, low2, low3, low4, low5, low6, low7, high0, high1, high2, high3, high4, high5, high6, high7;
#define LOAD(n) \
    low##n = n < slots && !fresh ? sums[n % rows * NV + from + n / rows * 2] : vf_zero(); \
    high##n = n < slots && !fresh ? sums[n % rows * NV + from + n / rows * 2 + 1] : vf_zero();
    EACH_SLOT(LOAD)
    for (b += from * VF; k > 0; k--, a += by_k, b += ldb) {
        vf weights[4];
        UNROLL
        for (int v = 0; v < vectors; v++)
            weights[v] = vf_load(b + v * VF);
#define SUM_WORD(n) \
    if (n < slots) { \
        vf word = vf_set1(a[n % rows * by_row]), first = weights[n < rows ? 0 : 2], second = weights[n < rows ? 1 : 3]; \
        low##n = word_sum(kind, low##n, first, word); \
        high##n = word_sum(kind, high##n, second, word); \
    }
        EACH_SLOT(SUM_WORD)
    }
    vf *out = sums;
    EACH_SLOT(KEEP)
}

/* Whole panels of the same. */
INLINE void pairs_panel(const int rows, const Linear *a, const uint8_t *panel, int64_t row, vf *out)
{
    const int wide = rows <= ROWS_WIDE;
    UNROLL
    for (int from = 0; from < NV; from += wide ? 4 : 2)
        tile_pairs(rows, wide, a, panel, row, from, out);
}

INLINE void words_panel(const int rows, const int kind, const float *a, int64_t by_row, int64_t by_k, const float *b,
                        int64_t ldb, int64_t k, int fresh, vf *sums)
{
    const int wide = rows <= ROWS_WIDE;
    UNROLL
    for (int from = 0; from < NV; from += wide ? 4 : 2)
        tile_words(rows, wide, kind, a, by_row, by_k, b, ldb, k, fresh, from, sums);
}

/* Only the row counts a level has registers for are compiled. */
#define ROWS_CASE(limit, n, call) \
    case n: \
        if (n <= limit) \
            call; \
        break;
#define EACH_UP_TO_8(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#define INTS(n) (n <= ROWS_INT ? n : 1)
#define FLOATS(n) (n <= ROWS_FLOAT ? n : 1)

static void words(int rows, int kind, const float *a, int64_t by_row, int64_t by_k, const float *b, int64_t ldb,
                  int64_t k, int fresh, vf *sums)
{
#define WORDS_OF(kind, n) \
    ROWS_CASE(ROWS_FLOAT, n, words_panel(FLOATS(n), kind, a, by_row, by_k, b, ldb, k, fresh, sums))
#define SINGLES(n) WORDS_OF(SINGLE, n)
#define PAIRS_BF16(n) WORDS_OF(PAIR_BF16, n)
#define PAIRS_I16(n) WORDS_OF(PAIR_I16, n)
#ifdef NATIVE_BF16
    if (kind == PAIR_BF16) {
        switch (rows) { EACH_UP_TO_8(PAIRS_BF16) }
        return;
    }
#endif
#ifdef NATIVE_I16
    if (kind == PAIR_I16) {
        switch (rows) { EACH_UP_TO_8(PAIRS_I16) }
        return;
    }
#endif
    (void)kind;
    switch (rows) { EACH_UP_TO_8(SINGLES) }
}

static void tile(const Linear *a, const uint8_t *panel, int apart, int rows, int64_t row, vf *out)
{
#define BYTES(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), W_I8, 0, a, panel, row / n, out))
#define BYTES_APART(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), W_I8, 1, a, panel, row / n, out))
#define NIBBLES(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), W_I4, 0, a, panel, row / n, out))
#define NIBBLES_APART(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), W_I4, 1, a, panel, row / n, out))
#define PAIRS(n) ROWS_CASE(ROWS_FLOAT, n, pairs_panel(FLOATS(n), a, panel, row, out))
    if (a->w->format == W_I8 && apart) {
        switch (rows) { EACH_UP_TO_8(BYTES_APART) }
    } else if (a->w->format == W_I8) {
        switch (rows) { EACH_UP_TO_8(BYTES) }
    } else if (a->w->format == W_I4 && apart) {
        switch (rows) { EACH_UP_TO_8(NIBBLES_APART) }
    } else if (a->w->format == W_I4) {
        switch (rows) { EACH_UP_TO_8(NIBBLES) }
    } else if (a->w->format == W_BF16 && !a->to_pairs) {
        switch (rows) { EACH_UP_TO_8(PAIRS) }
    } else {
        int64_t k = a->kp / (a->to_pairs ? 2 : 1);
        words(rows, a->to_pairs ? PAIR_BF16 : SINGLE, (const float *)a->x + row * k, k, 1, (const float *)panel, PANEL,
              k, 1, out);
    }
}

static void emit(const Linear *a, int64_t panel, int rows, int64_t row, const vf *sums)
{
    const Weights *w = a->w;
    int64_t first = panel * PANEL, columns = min(PANEL, w->n - first);
    float line[PANEL];
    for (int r = 0; r < rows; r++) {
        void *y = at(a->y, (row + r) * w->n + first, a->type);
        for (int v = 0; v < NV; v++)
            vf_store(line + v * VF, sums[r * NV + v]);
        if (w->bias)
            for (int64_t i = 0; i < columns; i++)
                line[i] += w->bias[first + i];
        if (columns == PANEL)
            narrow(y, line, PANEL, a->type);
        else
            narrow(y, line, columns, a->type);
    }
}

/* A packed panel with its words split, so that many rows of x share the splitting. */
INLINE void take_apart(const int kind, const Linear *a, const uint8_t *panel, uint8_t *out)
{
    const int parts = kind == W_I4 ? 2 : PARTS_I8;
    int64_t steps = a->w->group / (kind == W_I4 ? 8 : 4);
    for (int64_t g = 0; g < a->groups; g++) {
        memcpy(out, panel, PANEL * 2);
        panel += PANEL * 2;
        out += PANEL * 2;
        for (int64_t k = 0; k < steps; k++, panel += PANEL * 4, out += PANEL * 4 * parts) {
            prefetch_ahead(panel);
            UNROLL
            for (int v = 0; v < NV; v++) {
                vi packed = vi_load(panel + v * VF * 4);
                UNROLL
                for (int part = 0; part < parts; part++)
                    vi_store(out + part * PANEL * 4 + v * VF * 4, vi_split(kind, packed, part));
            }
        }
    }
}

static void linear_item(const void *job, int64_t item, int thread)
{
    const Linear *a = job;
    int64_t kind = a->w->format, first = item / a->chunks * a->block, last = min(a->tiles, first + a->block);
    int64_t panel = item % a->chunks * a->chunk, end = min(a->panels, panel + a->chunk);
    int apart = kind >= W_I8 && parts_of(kind) > 1 && last - first > TILES_SPLIT;
    vf sums[MAX_ROWS * NV];
    for (; panel < end; panel++) {
        const uint8_t *data = a->w->data + panel * a->panel;
        if (apart) {
            if (kind == W_I4)
                take_apart(W_I4, a, data, pool_private(thread));
            else
                take_apart(W_I8, a, data, pool_private(thread));
            data = pool_private(thread);
        }
        for (int64_t t = first; t < last; t++) {
            int64_t row = t * a->rows, rows = min(a->rows, a->m - row);
            tile(a, data, apart, (int)(kind >= W_I8 ? a->rows : rows), row, sums);
            emit(a, panel, (int)rows, row, sums);
        }
    }
}

#define SIXTEEN(kind) ((kind) == W_I8 && PARTS_I8 == 2) /* bits of a level of x */

/* The largest level of 16 bits whose products with weights add up to 31 bits over a group. */
INLINE float max_q16_of_group(int64_t group) { return (float)min(INT16_MAX, INT32_MAX / (127 * group)); }

INLINE int32_t sum_of(const int8_t *q, int64_t n)
{
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += q[i];
    return sum;
}

INLINE int32_t sum_of_wide(const int16_t *q, int64_t n)
{
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += q[i];
    return sum;
}

/* Levels q [kp] of a row into its place among the words of its tile: bytes as they are, of 16 bits the even and the odd
 * ones of four, as vi_split has their weights. */
INLINE void spread(int32_t *x, const int8_t *q, int64_t kp, int64_t rows)
{
    for (int64_t k = 0; k < kp; k += 4, x += rows)
        memcpy(x, q + k, 4);
}

INLINE void spread_wide(int32_t *x, const int16_t *q, int64_t kp, int64_t rows)
{
    for (int64_t k = 0; k < kp; k += 4, x += 2 * rows) {
        x[0] = (int32_t)((uint16_t)q[k] | (uint32_t)(uint16_t)q[k + 2] << 16);
        x[rows] = (int32_t)((uint16_t)q[k + 1] | (uint32_t)(uint16_t)q[k + 3] << 16);
    }
}

static void prepare_quantised(const Linear *a, int64_t row, int thread)
{
    int64_t k = a->w->k, kp = a->kp, group = a->w->group, rows = a->rows, kind = a->w->format;
    float *x = pool_private(thread), max_q = max_q16_of_group(group);
    int8_t *q = (int8_t *)(x + kp);
    int16_t *wide = (int16_t *)(x + kp);
    int64_t of_tile = row / rows * a->groups * rows + row % rows;
    float *scales = (float *)a->scales + of_tile;
    int32_t *starts = (int32_t *)a->starts + row / rows * (kp / a->span) * rows + row % rows;
    int32_t *words = (int32_t *)a->x + row / rows * a->words * rows + row % rows;
    if (row < a->m)
        widen(x, at(a->source, row * k, a->type), k, a->type);
    memset(x + (row < a->m ? k : 0), 0, (size_t)(row < a->m ? kp - k : kp) * 4);
    for (int64_t g = 0; g < a->groups; g++) {
        if (SIXTEEN(kind)) {
            scales[g * rows] = quantise_wide(wide + g * group, x + g * group, group, max_q);
            starts[g * rows] = (int32_t)(-128u * (uint32_t)sum_of_wide(wide + g * group, group));
            continue;
        }
        scales[g * rows] = quantise(q + g * group, x + g * group, group);
        for (int64_t from = g * group; from < (g + 1) * group; from += a->span) {
            int32_t sum = sum_of(q + from, a->span);
            starts[from / a->span * rows] = kind == W_I4 ? start_of_4(sum) : -128 * sum;
        }
    }
    if (SIXTEEN(kind))
        spread_wide(words, wide, kp, rows);
    else
        spread(words, q, kp, rows);
}

static void prepare_item(const void *job, int64_t row, int thread)
{
    const Linear *a = job;
    int64_t k = a->w->k, kp = a->kp;
    const void *source = at(a->source, row * k, a->type);
    if (a->w->format >= W_I8) {
        prepare_quantised(a, row, thread);
    } else if (a->to_pairs) {
        uint16_t *x = (uint16_t *)a->x + row * kp;
        memcpy(x, source, (size_t)k * 2);
        memset(x + k, 0, (size_t)(kp - k) * 2);
    } else {
        float *x = (float *)a->x + row * kp;
        widen(x, source, k, a->type);
        memset(x + k, 0, (size_t)(kp - k) * 4);
    }
}

/* Make x what the tiles read; in place where it already is. Returns NO_MEMORY or OK. */
static int prepare(Linear *a)
{
    int64_t kind = a->w->format, kp = a->kp, rows = a->m;
    int quantised = kind >= W_I8;
#ifdef NATIVE_BF16
    a->to_pairs = kind == W_BF16 && a->type == BF16;
#endif
    int in_place = !quantised && kp == a->w->k && (a->to_pairs ? BF16 : F32) == a->type;
    size_t bytes = 0, scales = 0, starts = 0, own = 0;
    if (quantised) {
        rows = a->tiles * a->rows;
        bytes = (size_t)round_up(rows * a->words * 4, 64);
        scales = (size_t)(rows * a->groups) * 4;
        starts = (size_t)(rows * (kp / a->span)) * 4;
        own = (size_t)max(kp * 6, kp * PANEL * (kind == W_I8 ? PARTS_I8 : 1) + a->groups * PANEL * 2);
    } else if (!in_place) {
        bytes = (size_t)round_up(rows * kp * (a->to_pairs ? 2 : 4), 64);
    }
    if (pool_reserve(bytes + scales + starts, own))
        return NO_MEMORY;
    a->x = in_place ? a->source : pool_shared();
    a->scales = (const float *)((char *)pool_shared() + bytes);
    a->starts = (const int32_t *)((char *)pool_shared() + bytes + scales);
    if (in_place)
        return OK;
    if (rows * kp <= SMALL_WORK / 2)
        for (int64_t row = 0; row < rows; row++)
            prepare_item(a, row, 0);
    else
        pool_run(prepare_item, a, rows);
    return OK;
}

/* x [m, k] -> y [m, n], both contiguous and of `type`. */
static int linear(const Weights *w, const void *x, void *y, int64_t m, int64_t type)
{
    Linear job = {.w = w, .source = x, .y = y, .m = m, .type = type};
    if (m < 0 || bad_weights(w))
        return BAD_SHAPE;
    if (m == 0)
        return OK;
    int quantised = w->format >= W_I8;
    int64_t max_rows = quantised ? ROWS_INT : ROWS_FLOAT;
    job.kp = padded_k(w->format, w->k);
    job.groups = quantised ? job.kp / w->group : 1;
    job.span = !quantised ? job.kp : w->group;
    if (w->format == W_I4 && w->group > SPAN_I4)
        job.span = w->group % SPAN_I4 ? 8 : SPAN_I4;
    job.words = job.kp / 4 * (w->format == W_I8 ? PARTS_I8 : 1);
    job.panel = panel_bytes(w->format, w->k, w->group);
    job.panels = (w->n + PANEL - 1) / PANEL;
    job.tiles = (m + max_rows - 1) / max_rows;
    job.rows = (m + job.tiles - 1) / job.tiles;
    job.tiles = (m + job.rows - 1) / job.rows;
    int64_t tile_bytes = job.rows * (quantised ? job.words * 4 : job.kp * 4);
    int64_t blocks = job.tiles / max(4, CACHE_BYTES / tile_bytes) + 1;
    job.block = (job.tiles + blocks - 1) / blocks;
    job.chunk = max(1, ITEM_BYTES / (job.panel * min(m, 64)));
    job.chunks = (job.panels + job.chunk - 1) / job.chunk;
    if (prepare(&job))
        return NO_MEMORY;
    pool_run(linear_item, &job, (job.tiles + job.block - 1) / job.block * job.chunks);
    return OK;
}

#endif
