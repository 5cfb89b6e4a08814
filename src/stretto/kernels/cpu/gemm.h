/* y = x W^T + bias over packed panels.
 *
 * One row of x streams the weights once, so memory sets the pace; more rows share each panel while it is in cache.
 * Integer kinds take weights unsigned (offset by 128 or 8) and activations signed, quantised here per row and group
 * of k; the offset is taken back by starting each sum at -offset * sum(x). A row holding NaN or infinity in a group
 * gives NaN in that row of y and touches no other. */

#define CACHE_BYTES 262144 /* of x that is kept at hand while all panels pass by */
#define ITEM_BYTES 16384 /* of weights: a turn that is worth taking */

typedef struct {
    const Weights *w;
    const void *x; /* as the tiles read it: float, bf16 pairs or int8 */
    const float *scales; /* [m, groups] of quantised x */
    const int32_t *starts; /* [m, groups], what an integer sum starts at */
    void *y;
    const void *source;
    int64_t m, type, kp, groups, panel; /* panel: bytes */
    int64_t block, panels, chunk, chunks; /* rows per block of x, panels in all, panels per item, items per block */
    int to_pairs;
} Linear;

INLINE void load_scales(vf *scales, const uint8_t *data)
{
    UNROLL
    for (int v = 0; v < NV; v++)
        scales[v] = vf_bf16((const uint16_t *)data + v * VF);
}

/* Weights in bytes: int8 (small = 0), or int4 already taken apart (small = 1). */
INLINE void tile_bytes(const int rows, const int small, const Linear *a, const uint8_t *panel, int64_t row, vf *out)
{
    int64_t groups = a->groups, group = a->w->group, kp = a->kp;
    const int8_t *x = (const int8_t *)a->x + row * kp;
    const float *scales = a->scales + row * groups;
    const int32_t *starts = a->starts + row * groups;
    vf sums[ROWS_INT * NV];
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        sums[i] = vf_zero();
    for (int64_t g = 0; g < groups; g++) {
        vi counts[ROWS_INT * NV];
        const uint8_t *data = panel + PANEL * 2;
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                counts[r * NV + v] = vi_set1(starts[r * groups + g]);
        for (int64_t k = 0; k < group; k += 4, data += PANEL * 4) {
            vi weights[NV];
            UNROLL
            for (int v = 0; v < NV; v++)
                weights[v] = vi_load(data + v * VF * 4);
            UNROLL
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * kp + k, 4);
                vi fours = vi_set1(four);
                UNROLL
                for (int v = 0; v < NV; v++)
                    counts[r * NV + v] = small ? vi_dot_small(counts[r * NV + v], weights[v], fours)
                                               : vi_dot(counts[r * NV + v], weights[v], fours);
            }
        }
        vf by_weight[NV];
        load_scales(by_weight, panel);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                sums[r * NV + v] = vf_fma(vf_from(counts[r * NV + v]),
                                          vf_mul(by_weight[v], vf_set1(scales[r * groups + g])), sums[r * NV + v]);
        x += group;
        panel = data;
    }
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        out[i] = sums[i];
}

INLINE void tile_nibbles(const int rows, const Linear *a, const uint8_t *panel, int64_t row, vf *out)
{
    int64_t groups = a->groups, group = a->w->group, kp = a->kp;
    const int8_t *x = (const int8_t *)a->x + row * kp;
    const float *scales = a->scales + row * groups;
    const int32_t *starts = a->starts + row * groups;
    vf sums[ROWS_INT * NV];
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        sums[i] = vf_zero();
    for (int64_t g = 0; g < groups; g++) {
        vi counts[ROWS_INT * NV];
        const uint8_t *data = panel + PANEL * 2;
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                counts[r * NV + v] = vi_set1(starts[r * groups + g]);
        for (int64_t k = 0; k < group; k += 8, data += PANEL * 4) {
            vi low[NV], high[NV];
            UNROLL
            for (int v = 0; v < NV; v++) {
                vi both = vi_load(data + v * VF * 4);
                low[v] = vi_low(both);
                high[v] = vi_high(both);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                int32_t four[2];
                memcpy(four, x + r * kp + k, 8);
                UNROLL
                for (int v = 0; v < NV; v++) {
                    counts[r * NV + v] = vi_dot_small(counts[r * NV + v], low[v], vi_set1(four[0]));
                    counts[r * NV + v] = vi_dot_small(counts[r * NV + v], high[v], vi_set1(four[1]));
                }
            }
        }
        vf by_weight[NV];
        load_scales(by_weight, panel);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                sums[r * NV + v] = vf_fma(vf_from(counts[r * NV + v]),
                                          vf_mul(by_weight[v], vf_set1(scales[r * groups + g])), sums[r * NV + v]);
        x += group;
        panel = data;
    }
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        out[i] = sums[i];
}

/* Weights in bf16 pairs of k, x in float. */
INLINE void tile_pairs(const int rows, const Linear *a, const uint8_t *panel, int64_t row, vf *out)
{
    const float *x = (const float *)a->x + row * a->kp;
    int64_t kp = a->kp;
    vf sums[ROWS_FLOAT * NV];
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        sums[i] = vf_zero();
    for (int64_t k = 0; k < kp; k += 2, panel += PANEL * 4) {
        vf even[NV], odd[NV];
        UNROLL
        for (int v = 0; v < NV; v++) {
            vi pairs = vi_load(panel + v * VF * 4);
            even[v] = vf_even(pairs);
            odd[v] = vf_odd(pairs);
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < NV; v++) {
                sums[r * NV + v] = vf_fma(even[v], vf_set1(x[r * kp + k]), sums[r * NV + v]);
                sums[r * NV + v] = vf_fma(odd[v], vf_set1(x[r * kp + k + 1]), sums[r * NV + v]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        out[i] = sums[i];
}

/* sums[r][PANEL] += sum over k of a[r * by_row + k * by_k] * b[k * ldb + 0..PANEL), all in words: floats, or with
 * `pairs` bf16 pairs, whose products count double. */
INLINE void tile_words(const int rows, const int pairs, const float *a, int64_t by_row, int64_t by_k, const float *b,
                       int64_t ldb, int64_t k, vf *sums)
{
    vf local[ROWS_FLOAT * NV];
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        local[i] = sums[i];
    for (; k > 0; k--, a += by_k, b += ldb) {
        vf words[NV];
        UNROLL
        for (int v = 0; v < NV; v++)
            words[v] = vf_load(b + v * VF);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vf word = vf_set1(a[r * by_row]);
            UNROLL
            for (int v = 0; v < NV; v++)
                local[r * NV + v] = pairs ? vf_dot_pairs(local[r * NV + v], words[v], word)
                                          : vf_fma(words[v], word, local[r * NV + v]);
        }
    }
    UNROLL
    for (int i = 0; i < rows * NV; i++)
        sums[i] = local[i];
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

static void words(int rows, int pairs, const float *a, int64_t by_row, int64_t by_k, const float *b, int64_t ldb,
                  int64_t k, vf *sums)
{
#define SINGLE(n) ROWS_CASE(ROWS_FLOAT, n, tile_words(FLOATS(n), 0, a, by_row, by_k, b, ldb, k, sums))
#define PAIRED(n) ROWS_CASE(ROWS_FLOAT, n, tile_words(FLOATS(n), 1, a, by_row, by_k, b, ldb, k, sums))
#ifdef NATIVE_BF16
    if (pairs) {
        switch (rows) { EACH_UP_TO_8(PAIRED) }
        return;
    }
#endif
    (void)pairs;
    switch (rows) { EACH_UP_TO_8(SINGLE) }
}

static void tile(const Linear *a, const uint8_t *panel, int apart, int rows, int64_t row, vf *out)
{
#define BYTES(n) ROWS_CASE(ROWS_INT, n, tile_bytes(INTS(n), 0, a, panel, row, out))
#define APART(n) ROWS_CASE(ROWS_INT, n, tile_bytes(INTS(n), 1, a, panel, row, out))
#define NIBBLES(n) ROWS_CASE(ROWS_INT, n, tile_nibbles(INTS(n), a, panel, row, out))
#define PAIRS(n) ROWS_CASE(ROWS_FLOAT, n, tile_pairs(FLOATS(n), a, panel, row, out))
    if (a->w->kind == W_I8) {
        switch (rows) { EACH_UP_TO_8(BYTES) }
    } else if (a->w->kind == W_I4 && apart) {
        switch (rows) { EACH_UP_TO_8(APART) }
    } else if (a->w->kind == W_I4) {
        switch (rows) { EACH_UP_TO_8(NIBBLES) }
    } else if (a->w->kind == W_BF16 && !a->to_pairs) {
        switch (rows) { EACH_UP_TO_8(PAIRS) }
    } else {
        int64_t k = a->kp / (a->to_pairs ? 2 : 1);
        for (int i = 0; i < rows * NV; i++)
            out[i] = vf_zero();
        words(rows, a->to_pairs, (const float *)a->x + row * k, k, 1, (const float *)panel, PANEL, k, out);
    }
}

static void emit(const Linear *a, int64_t panel, int rows, int64_t row, const vf *sums)
{
    const Weights *w = a->w;
    int64_t first = panel * PANEL, columns = least(PANEL, w->n - first);
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

/* An int4 panel as a panel of bytes, so that many rows of x share the taking apart. */
static void take_apart(const Linear *a, const uint8_t *panel, uint8_t *out)
{
    for (int64_t g = 0; g < a->groups; g++) {
        memcpy(out, panel, PANEL * 2);
        panel += PANEL * 2;
        out += PANEL * 2;
        for (int64_t k = 0; k < a->w->group; k += 8, panel += PANEL * 4, out += PANEL * 8)
            for (int v = 0; v < NV; v++) {
                vi both = vi_load(panel + v * VF * 4);
                vi_store(out + v * VF * 4, vi_low(both));
                vi_store(out + PANEL * 4 + v * VF * 4, vi_high(both));
            }
    }
}

static void linear_item(const void *job, int64_t item, int thread)
{
    const Linear *a = job;
    int64_t first = item / a->chunks * a->block, rows = least(a->block, a->m - first);
    int most_rows = a->w->kind >= W_I8 ? ROWS_INT : ROWS_FLOAT;
    int64_t tiles = (rows + most_rows - 1) / most_rows, each = (rows + tiles - 1) / tiles;
    int apart = a->w->kind == W_I4 && tiles > 1;
    int64_t panel = item % a->chunks * a->chunk, end = least(a->panels, panel + a->chunk);
    vf sums[ROWS_FLOAT * NV];
    for (; panel < end; panel++) {
        const uint8_t *data = a->w->data + panel * a->panel;
        if (apart) {
            take_apart(a, data, pool_private(thread));
            data = pool_private(thread);
        }
        for (int64_t row = first; row < first + rows; row += each) {
            int count = (int)least(each, first + rows - row);
            tile(a, data, apart, count, row, sums);
            emit(a, panel, count, row, sums);
        }
    }
}

INLINE void quantise_group(int8_t *restrict q, const float *restrict x, int64_t n, int offset, float *scale,
                           int32_t *start)
{
    uint32_t top = largest(x, n);
    int finite = top < 0x7f800000, some = float_of(top) > 1e-30f;
    float inverse = finite && some ? 127.0f / float_of(top) : 0.0f;
    int32_t sum = 0;
    *scale = !finite ? NAN : some ? float_of(top) / 127.0f : 0.0f;
    if (!finite) {
        memset(q, 0, (size_t)n);
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) {
            int32_t level = (int32_t)((x[i] * inverse + ROUND) - ROUND);
            sum += level;
            q[i] = (int8_t)level;
        }
    }
    *start = -offset * sum;
}

static void prepare_item(const void *job, int64_t row, int thread)
{
    const Linear *a = job;
    int64_t k = a->w->k, kp = a->kp, group = a->w->group;
    const void *source = at(a->source, row * k, a->type);
    if (a->w->kind < W_I8) {
        if (a->to_pairs) {
            uint16_t *x = (uint16_t *)a->x + row * kp;
            memcpy(x, source, (size_t)k * 2);
            memset(x + k, 0, (size_t)(kp - k) * 2);
        } else {
            float *x = (float *)a->x + row * kp;
            widen(x, source, k, a->type);
            memset(x + k, 0, (size_t)(kp - k) * 4);
        }
        return;
    }
    float *x = pool_private(thread);
    widen(x, source, k, a->type);
    memset(x + k, 0, (size_t)(kp - k) * 4);
    for (int64_t g = 0; g < a->groups; g++)
        quantise_group((int8_t *)a->x + row * kp + g * group, x + g * group, group, a->w->kind == W_I8 ? 128 : 8,
                       (float *)a->scales + row * a->groups + g, (int32_t *)a->starts + row * a->groups + g);
}

/* Make x what the tiles read; in place where it already is. Returns NO_MEMORY or OK. */
static int prepare(Linear *a)
{
    int64_t kind = a->w->kind, m = a->m, kp = a->kp;
    int quantised = kind >= W_I8;
#ifdef NATIVE_BF16
    a->to_pairs = kind == W_BF16 && a->type == BF16;
#endif
    int64_t element = quantised ? 1 : a->to_pairs ? 2 : 4;
    int in_place = !quantised && kp == a->w->k && (a->to_pairs ? BF16 : F32) == a->type;
    size_t bytes = in_place ? 0 : (size_t)round_up(m * kp * element, 64);
    size_t per_group = quantised ? (size_t)(m * a->groups) * 4 : 0;
    size_t own = quantised ? (size_t)most(kp * 4, kind == W_I4 ? kp * PANEL + a->groups * PANEL * 2 : 0) : 0;
    if (pool_reserve(bytes + 2 * per_group, own))
        return NO_MEMORY;
    a->x = in_place ? a->source : pool_shared();
    a->scales = (const float *)((char *)pool_shared() + bytes);
    a->starts = (const int32_t *)((char *)pool_shared() + bytes + per_group);
    if (in_place)
        return OK;
    if (m * kp <= SMALL_WORK / 2)
        for (int64_t row = 0; row < m; row++)
            prepare_item(a, row, 0);
    else
        pool_run(prepare_item, a, m);
    return OK;
}

/* x [m, k] -> y [m, n], both contiguous and of `type`. */
static int linear(const Weights *w, const void *x, void *y, int64_t m, int64_t type)
{
    Linear job = {.w = w, .source = x, .y = y, .m = m, .type = type};
    if (m < 0 || shape_of_weights_is_bad(w))
        return BAD_SHAPE;
    if (m == 0)
        return OK;
    job.kp = padded_k(w->kind, w->k);
    job.groups = w->kind >= W_I8 ? job.kp / w->group : 1;
    job.panel = panel_bytes(w->kind, w->k, w->group);
    job.panels = (w->n + PANEL - 1) / PANEL;
    int64_t rows = w->kind >= W_I8 ? ROWS_INT : ROWS_FLOAT, row_bytes = job.kp * (w->kind >= W_I8 ? 1 : 4);
    int64_t blocks = (m + 3) / most(4 * rows, CACHE_BYTES / row_bytes) + 1;
    job.block = round_up((m + blocks - 1) / blocks, rows);
    if (m <= job.block)
        job.block = m;
    job.chunk = most(1, ITEM_BYTES / (job.panel * least(m, 64)));
    job.chunks = (job.panels + job.chunk - 1) / job.chunk;
    if (prepare(&job))
        return NO_MEMORY;
    pool_run(linear_item, &job, (m + job.block - 1) / job.block * job.chunks);
    return OK;
}
