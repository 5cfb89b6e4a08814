/* y = x W^T + bias over packed panels.
 *
 * One row of x reads the weights once, at the speed of memory. More rows share each panel while it is in cache.
 *
 * Quantised weights are unsigned (offset by 128 or 8) and multiplied with signed x, which is quantised here for each
 * row and group of k. A sum starts with the negative of what the offset adds to it (`first_sum`). A NaN or infinity in
 * a row of x makes that row of y NaN, and no other.
 *
 * Each instruction set (isa/vec*.h) defines the products for weights of so many bits: X_BITS of quantised x, PARTS into
 * which `vi_split` splits a packed word, and EXACT_K, the k that may be summed as integers. Quantised x is stored in
 * words; those of the rows of a tile are neighbours. A word of x is multiplied with one part of each output's word. */
#ifndef STRETTO_GEMM_H
#define STRETTO_GEMM_H

#include "pack.h"
#include "pool.h"
#include "rows.h"
#include "scalar.h"

#define CACHE_BYTES 262144 /* of x that stays in cache while all panels are read */
#define ITEM_BYTES 16384 /* of weights: an item that is worth taking */
#define TILES_SPLIT 4 /* with more tiles of x, a panel is split once for all; with fewer, each splits it again */
#define PREFETCH_BYTES 2048 /* how far ahead: the hardware prefetches only within a page */

typedef struct {
    const Weights *w;
    const void *x; /* floats or bf16 pairs [m, kp], or words [tiles, words, rows] */
    const float *scales; /* of quantised x [tiles, groups, rows] */
    const int32_t *first_sums; /* of integer sums [tiles, spans, rows] */
    void *y;
    const void *source;
    int64_t m, type, kp, groups, panel; /* panel: bytes */
    int64_t rows, tiles, block; /* rows of a tile, tiles in all, tiles per block of x */
    int64_t bits, x_bits; /* of quantised weights and x */
    int64_t span, words; /* k that are summed as integers; words of a row of x */
    int64_t panels, chunk, chunks; /* panels in all, panels per item, items per block */
    int to_pairs;
} Linear;

/* Each sum is a variable of its own: the compiler would keep an array of them in memory. */
#define EACH_SLOT(CASE) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)

/* For one word of each output. */
INLINE void prefetch_ahead(const uint8_t *data)
{
    UNROLL
    for (int line = 0; line < PANEL * 4; line += 64)
        __builtin_prefetch(data + PREFETCH_BYTES + line);
}

/* Sums of a tile with quantised weights, packed or already split. Covers two vectors of the panel, from `from` on, or
 * four when `wide`; the sums of the second two are in the slots of further rows. */
INLINE void tile_integers(const int rows, const int wide, const int bits, const int split, const Linear *a,
                          const uint8_t *panel, int64_t tile, const int from, vf *out)
{
    const int parts = PARTS(bits), per_word = 32 / bits, slots = wide ? 2 * rows : rows;
    const int stride = PANEL * 4 * (split ? parts : 1), vectors = wide ? 4 : 2;
    int64_t groups = a->groups, spans = a->w->group / a->span, steps = a->span / per_word;
    const int32_t *x = (const int32_t *)a->x + tile * a->words * rows;
    const float *scales = a->scales + tile * groups * rows;
    const int32_t *first_sums = a->first_sums + tile * groups * spans * rows;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            out[r * NV + from + v] = vf_zero();
    for (int64_t g = 0; g < groups; g++, scales += rows) {
        const uint8_t *data = panel + PANEL * 2 + from * VF * 4;
        for (int64_t s = 0; s < spans; s++, first_sums += rows) {
            vi low0, low1, low2, low3, low4, low5, low6, low7, high0, high1, high2, high3, high4, high5, high6, high7;
#define START(n) low##n = high##n = vi_set1(n < slots ? first_sums[n % rows] : 0);
            EACH_SLOT(START)
            for (int64_t k = 0; k < steps; k++, data += stride) {
                if (!split && from == 0)
                    prefetch_ahead(data);
                UNROLL
                for (int part = 0; part < parts; part++, x += rows) {
                    vi weights[4];
                    UNROLL
                    for (int v = 0; v < vectors; v++)
                        weights[v] = split ? vi_load(data + part * PANEL * 4 + v * VF * 4)
                                           : vi_split(bits, vi_load(data + v * VF * 4), part);
#define SUM(n) \
    if (n < slots) { \
        vi word = vi_set1(x[n % rows]); \
        low##n = vi_dot(bits, low##n, weights[n < rows ? 0 : 2], word); \
        high##n = vi_dot(bits, high##n, weights[n < rows ? 1 : 3], word); \
    }
                    EACH_SLOT(SUM)
                }
            }
            const uint16_t *by_weight = (const uint16_t *)panel + from * VF;
#define SCALE(n) \
    if (n < slots) { \
        vf *sum = out + n % rows * NV + from + n / rows * 2, by_row = vf_set1(scales[n % rows]); \
        const uint16_t *by = by_weight + n / rows * 2 * VF; \
        sum[0] = vf_fma(vf_from(vi_total(bits, low##n)), vf_mul(vf_bf16(by), by_row), sum[0]); \
        sum[1] = vf_fma(vf_from(vi_total(bits, high##n)), vf_mul(vf_bf16(by + VF), by_row), sum[1]); \
    }
            EACH_SLOT(SCALE)
        }
        panel = data - from * VF * 4;
    }
}

/* A whole panel, in as few passes as there are registers for. */
INLINE void tile_panel(const int rows, const int bits, const int split, const Linear *a, const uint8_t *panel,
                       int64_t tile, vf *out)
{
    const int wide = rows <= ROWS_WIDE;
    UNROLL
    for (int from = 0; from < NV; from += wide ? 4 : 2)
        tile_integers(rows, wide, bits, split, a, panel, tile, from, out);
}

/* The content of a word of weights: a float, two numbers whose products are added, or two bf16 that are widened and
 * multiplied with two floats. */
enum { SINGLE, PAIR_BF16, PAIR_I16, WIDENED };

INLINE vf word_sum(const int content, vf sum, vf a, vf b)
{
    return content == PAIR_BF16 ? vf_dot_pairs(sum, a, b)
         : content == PAIR_I16  ? (vf)vi_dot_i16(vi_bits(sum), vi_bits(a), vi_bits(b))
                                : vf_sum(a, b, sum);
}

INLINE vf word_part(const int content, const float *words, int part)
{
    if (content != WIDENED)
        return vf_load(words);
    return part ? vf_odd(vi_load(words)) : vf_even(vi_load(words));
}

/* sums[r][PANEL] += sum over k of a[r * by_row + k * by_k] * b[k * ldb + 0..PANEL), in words of one content. `fresh`:
 * the sums start at 0. Those of PAIR_I16 are 32-bit integers. Vectors as in tile_integers. */
INLINE void tile_words(const int rows, const int wide, const int content, const float *a, int64_t by_row, int64_t by_k,
                       const float *b, int64_t ldb, int64_t k, int fresh, const int from, vf *sums)
{
    const int slots = wide ? 2 * rows : rows, vectors = wide ? 4 : 2, parts = content == WIDENED ? 2 : 1;
    vf low0, low1, low2, low3, low4, low5, low6, low7, high0, high1, high2, high3, high4, high5, high6, high7;
#define LOAD(n) \
    low##n = n < slots && !fresh ? sums[n % rows * NV + from + n / rows * 2] : vf_zero(); \
    high##n = n < slots && !fresh ? sums[n % rows * NV + from + n / rows * 2 + 1] : vf_zero();
    EACH_SLOT(LOAD)
    for (b += from * VF; k > 0; k--, a += by_k, b += ldb) {
        UNROLL
        for (int part = 0; part < parts; part++) {
            vf weights[4];
            UNROLL
            for (int v = 0; v < vectors; v++)
                weights[v] = word_part(content, b + v * VF, part);
#define SUM_WORD(n) \
    if (n < slots) { \
        vf word = vf_set1(a[n % rows * by_row + part]); \
        low##n = word_sum(content, low##n, weights[n < rows ? 0 : 2], word); \
        high##n = word_sum(content, high##n, weights[n < rows ? 1 : 3], word); \
    }
            EACH_SLOT(SUM_WORD)
        }
    }
#define KEEP(n) \
    if (n < slots) { \
        sums[n % rows * NV + from + n / rows * 2] = low##n; \
        sums[n % rows * NV + from + n / rows * 2 + 1] = high##n; \
    }
    EACH_SLOT(KEEP)
}

INLINE void words_panel(const int rows, const int content, const float *a, int64_t by_row, int64_t by_k, const float *b,
                        int64_t ldb, int64_t k, int fresh, vf *sums)
{
    const int wide = rows <= ROWS_WIDE;
    UNROLL
    for (int from = 0; from < NV; from += wide ? 4 : 2)
        tile_words(rows, wide, content, a, by_row, by_k, b, ldb, k, fresh, from, sums);
}

/* Compiles only the row counts for which the instruction set has registers. */
#define ROWS_CASE(limit, n, call) \
    case n: \
        if (n <= limit) \
            call; \
        break;
#define EACH_UP_TO_8(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#define INTS(n) (n <= ROWS_INT ? n : 1)
#define FLOATS(n) (n <= ROWS_FLOAT ? n : 1)

static void words(int rows, int content, const float *a, int64_t by_row, int64_t by_k, const float *b, int64_t ldb,
                  int64_t k, int fresh, vf *sums)
{
#define WORDS_OF(content, n) \
    ROWS_CASE(ROWS_FLOAT, n, words_panel(FLOATS(n), content, a, by_row, by_k, b, ldb, k, fresh, sums))
#define SINGLES(n) WORDS_OF(SINGLE, n)
#define PAIRS_BF16(n) WORDS_OF(PAIR_BF16, n)
#define PAIRS_I16(n) WORDS_OF(PAIR_I16, n)
#define WIDENEDS(n) WORDS_OF(WIDENED, n)
    if (HAS_BF16 && content == PAIR_BF16)
        switch (rows) {
            EACH_UP_TO_8(PAIRS_BF16)
        }
    else if (HAS_I16 && content == PAIR_I16)
        switch (rows) {
            EACH_UP_TO_8(PAIRS_I16)
        }
    else if (content == WIDENED)
        switch (rows) {
            EACH_UP_TO_8(WIDENEDS)
        }
    else
        switch (rows) {
            EACH_UP_TO_8(SINGLES)
        }
}

/* Sums of `rows` rows of x from `row` on with a panel, for each format. `split`: see split_panel. */
static void tile_f32(const Linear *a, const uint8_t *panel, int split, int rows, int64_t row, vf *out)
{
    (void)split;
    words(rows, SINGLE, (const float *)a->x + row * a->kp, a->kp, 1, (const float *)panel, PANEL, a->kp, 1, out);
}

static void tile_bf16(const Linear *a, const uint8_t *panel, int split, int rows, int64_t row, vf *out)
{
    int64_t by_k = a->to_pairs ? 1 : 2, by_row = a->kp / 2 * by_k;
    const float *x = (const float *)a->x + row * by_row;
    (void)split;
    words(rows, a->to_pairs ? PAIR_BF16 : WIDENED, x, by_row, by_k, (const float *)panel, PANEL, a->kp / 2, 1, out);
}

INLINE void tile_integer(const int bits, const Linear *a, const uint8_t *panel, int split, int rows, int64_t row,
                         vf *out)
{
#define PACKED(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), bits, 0, a, panel, row / n, out))
#define SPLIT(n) ROWS_CASE(ROWS_INT, n, tile_panel(INTS(n), bits, 1, a, panel, row / n, out))
    if (PARTS(bits) > 1 && split)
        switch (rows) {
            EACH_UP_TO_8(SPLIT)
        }
    else
        switch (rows) {
            EACH_UP_TO_8(PACKED)
        }
}

static void tile_q8(const Linear *a, const uint8_t *panel, int split, int rows, int64_t row, vf *out)
{
    tile_integer(8, a, panel, split, rows, row, out);
}

static void tile_q4(const Linear *a, const uint8_t *panel, int split, int rows, int64_t row, vf *out)
{
    tile_integer(4, a, panel, split, rows, row, out);
}

/* Splits the words of a packed panel once, for many rows of x. */
INLINE void split_panel(const int bits, const Linear *a, const uint8_t *panel, uint8_t *out)
{
    int64_t steps = a->w->group * bits / 32;
    for (int64_t g = 0; g < a->groups; g++) {
        memcpy(out, panel, PANEL * 2);
        panel += PANEL * 2;
        out += PANEL * 2;
        for (int64_t k = 0; k < steps; k++, panel += PANEL * 4, out += PANEL * 4 * PARTS(bits)) {
            prefetch_ahead(panel);
            UNROLL
            for (int v = 0; v < NV; v++) {
                vi packed = vi_load(panel + v * VF * 4);
                UNROLL
                for (int part = 0; part < PARTS(bits); part++)
                    vi_store(out + part * PANEL * 4 + v * VF * 4, vi_split(bits, packed, part));
            }
        }
    }
}

static void split_q8(const Linear *a, const uint8_t *panel, uint8_t *out) { split_panel(8, a, panel, out); }
static void split_q4(const Linear *a, const uint8_t *panel, uint8_t *out) { split_panel(4, a, panel, out); }

/* What differs between the formats. */
static const struct {
    void (*tile)(const Linear *a, const uint8_t *panel, int split, int rows, int64_t row, vf *out);
    void (*split)(const Linear *a, const uint8_t *panel, uint8_t *out);
} KERNELS[] = {
    [W_F32] = {tile_f32},
    [W_BF16] = {tile_bf16},
    [W_I8] = {tile_q8, split_q8},
    [W_I4] = {tile_q4, split_q4},
};

static void store_rows(const Linear *a, int64_t panel, int rows, int64_t row, const vf *sums)
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

static void linear_item(const void *job, int64_t item, int thread)
{
    const Linear *a = job;
    int64_t format = a->w->format, first = item / a->chunks * a->block, last = min(a->tiles, first + a->block);
    int64_t panel = item % a->chunks * a->chunk, end = min(a->panels, panel + a->chunk);
    int quantised = FORMATS[format].quantised, split = quantised && PARTS(a->bits) > 1 && last - first > TILES_SPLIT;
    vf sums[MAX_ROWS * NV];
    for (; panel < end; panel++) {
        const uint8_t *data = a->w->data + panel * a->panel;
        if (split) {
            KERNELS[format].split(a, data, pool_private(thread));
            data = pool_private(thread);
        }
        for (int64_t t = first; t < last; t++) {
            int64_t row = t * a->rows, rows = min(a->rows, a->m - row);
            KERNELS[format].tile(a, data, split, (int)(quantised ? a->rows : rows), row, sums);
            store_rows(a, panel, (int)rows, row, sums);
        }
    }
}

/* The largest magnitude of quantised x. The products of a group of 16-bit x must add up to less than 2^31. */
INLINE float max_q(const Linear *a)
{
    return a->x_bits == 8 ? 127.0f : (float)min(INT16_MAX, INT32_MAX / (127 * a->w->group));
}

INLINE int32_t sum_of(const int16_t *q, int64_t n)
{
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += q[i];
    return sum;
}

/* A row of quantised x [kp] into its column of the words of its tile: four bytes each, or the even and then the odd
 * two of four in 16 bits, as vi_split has their weights. `bytes` [kp] is scratch. */
INLINE void spread(const Linear *a, int32_t *words, const int16_t *restrict q, int8_t *restrict bytes)
{
    int64_t rows = a->rows;
    if (a->x_bits == 8) {
        narrow_q8(bytes, q, a->kp);
        for (int64_t k = 0; k < a->kp; k += 4, words += rows)
            memcpy(words, bytes + k, 4);
        return;
    }
    for (int64_t k = 0; k < a->kp; k += 4, words += 2 * rows) {
        words[0] = (int32_t)((uint16_t)q[k] | (uint32_t)(uint16_t)q[k + 2] << 16);
        words[rows] = (int32_t)((uint16_t)q[k + 1] | (uint32_t)(uint16_t)q[k + 3] << 16);
    }
}

static void prepare_quantised(const Linear *a, int64_t row, int thread)
{
    int64_t k = a->w->k, kp = a->kp, group = a->w->group, rows = a->rows;
    float *x = pool_private(thread);
    int16_t *q = (int16_t *)(x + kp);
    float *scales = (float *)a->scales + row / rows * a->groups * rows + row % rows;
    int32_t *first_sums = (int32_t *)a->first_sums + row / rows * (kp / a->span) * rows + row % rows;
    if (row < a->m)
        widen(x, at(a->source, row * k, a->type), k, a->type);
    memset(x + (row < a->m ? k : 0), 0, (size_t)(row < a->m ? kp - k : kp) * 4);
    for (int64_t g = 0; g < a->groups; g++)
        scales[g * rows] = quantise(q + g * group, x + g * group, group, max_q(a));
    for (int64_t s = 0; s < kp / a->span; s++)
        first_sums[s * rows] = first_sum((int)a->bits, sum_of(q + s * a->span, a->span));
    spread(a, (int32_t *)a->x + row / rows * a->words * rows + row % rows, q, (int8_t *)x);
}

static void prepare_item(const void *job, int64_t row, int thread)
{
    const Linear *a = job;
    int64_t k = a->w->k, kp = a->kp;
    const void *source = at(a->source, row * k, a->type);
    if (format_of(a->w)->quantised) {
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

/* Converts x to what the tiles read. Uses x in place where it already is that. Returns NO_MEMORY or OK. */
static int prepare(Linear *a)
{
    int64_t format = a->w->format, kp = a->kp, rows = a->m;
    int quantised = FORMATS[format].quantised;
    a->to_pairs = HAS_BF16 && format == W_BF16 && a->type == BF16;
    int in_place = !quantised && kp == a->w->k && (a->to_pairs ? BF16 : F32) == a->type;
    size_t bytes = 0, scales = 0, first_sums = 0, own = 0;
    if (quantised) {
        rows = a->tiles * a->rows;
        bytes = (size_t)round_up(rows * a->words * 4, 64);
        scales = (size_t)(rows * a->groups) * 4;
        first_sums = (size_t)(rows * (kp / a->span)) * 4;
        own = (size_t)max(kp * 6, kp * PANEL * a->bits * PARTS(a->bits) / 8 + a->groups * PANEL * 2);
    } else if (!in_place) {
        bytes = (size_t)round_up(rows * kp * (a->to_pairs ? 2 : 4), 64);
    }
    if (pool_reserve(bytes + scales + first_sums, own))
        return NO_MEMORY;
    a->x = in_place ? a->source : pool_shared();
    a->scales = (const float *)((char *)pool_shared() + bytes);
    a->first_sums = (const int32_t *)((char *)pool_shared() + bytes + scales);
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
    int quantised = format_of(w)->quantised;
    int64_t max_rows = quantised ? ROWS_INT : ROWS_FLOAT;
    job.kp = padded_k(w);
    job.groups = job.span = 1;
    if (quantised) {
        job.groups = job.kp / w->group;
        job.bits = 32 / format_of(w)->per_word;
        job.x_bits = X_BITS(job.bits);
        job.words = job.kp * job.x_bits / 32;
        job.span = min(w->group, EXACT_K(job.bits));
        if (w->group % job.span)
            job.span = format_of(w)->per_word;
    }
    job.panel = panel_bytes(w);
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
