/* The types and numbers that Python, the exported functions and the kernels of every instruction set share. */
#ifndef STRETTO_API_H
#define STRETTO_API_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define PANEL 32 /* outputs that lie side by side in packed weights */
#define MAX_K 65536 /* with longer rows, a sum of int8 products could exceed 31 bits */

enum { F32 = 0, BF16 = 1, I8 = 2 }; /* I8: only keys and values */
enum { W_F32 = 0, W_BF16 = 1, W_I8 = 2, W_I4 = 3 };
enum { NORM_NONE = 0, NORM_HEAD = 1, NORM_ROW = 2 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum { OK = 0, NO_MEMORY = -1, BAD_SHAPE = -2 };

/* Packed weights of y = x W^T + bias, in panels of 32 outputs. A panel is one stream over k. In quantised formats, each
 * group of k starts with its 32 scales in bf16. `group` divides the padded k; it equals it when a row has one scale. */
typedef struct {
    const uint8_t *data;
    const float *bias;
    int64_t n, k, group, format;
} Weights;

/* The batch of one step. A layer of the cache holds keys [block, kv_head, offset, head_dim], then as many values.
 * `type` is the type of activations, `kv_type` that of the cache. */
typedef struct {
    const int64_t *positions, *slots; /* [tokens] */
    const int32_t *tables, *starts, *contexts; /* [sequences, width], [sequences + 1], [sequences] */
    int64_t tokens, sequences, width, blocks, block_size, type, kv_type;
} Step;

/* An attention layer. `window` and `softcap` are 0 when the layer has none. */
typedef struct {
    int64_t heads, kv_heads, head_dim, norm, window;
    float scale, softcap, eps;
} AttentionConfig;

enum {
    CALL_LINEAR = 0,
    CALL_NORM = 1,
    CALL_ADD_NORM = 2,
    CALL_ACT_AND_MUL = 3,
    CALL_ROPE_AND_CACHE = 4,
    CALL_ATTENTION = 5
};

/* One call of a program: `of` points to its weights, `source` and `target` number its buffers, `width` is the length
 * of the rows it writes. */
typedef struct {
    const void *of;
    const AttentionConfig *config;
    int64_t call, source, target, width, layer, rotation, activation;
    float eps;
} Call;

/* What the calls of one run of a program share. Buffer 1 is the residual. */
typedef struct {
    const Step *step;
    void *const *buffers;
    void *const *layers; /* of the KV cache */
    const float *const *angles;
    const int64_t *dims; /* of a head that are rotated, for each rotation */
} Run;

/* The kernels: name, parameters, and the names of these. Each returns OK or what went wrong. */
#define EACH_KERNEL(CASE) \
    CASE(pack, (const Weights *w, const void *source, int64_t type, uint8_t *data), (w, source, type, data)) \
    CASE(unpack, (const Weights *w, float *out), (w, out)) \
    CASE(linear, (const Weights *w, const void *x, void *y, int64_t m, int64_t type), (w, x, y, m, type)) \
    CASE(norm, \
         (const void *x, void *residual, const void *weight, void *y, int64_t m, int64_t h, float eps, int64_t type), \
         (x, residual, weight, y, m, h, eps, type)) \
    CASE(act_and_mul, (const void *x, void *y, int64_t m, int64_t f, int64_t activation, int64_t type), \
         (x, y, m, f, activation, type)) \
    CASE(cos_sin, (const Step *step, const float *frequencies, int64_t pairs, float scale, float *angles), \
         (step, frequencies, pairs, scale, angles)) \
    CASE(rope_and_cache, \
         (const Step *step, const AttentionConfig *config, void *qkv, const void *norms, const float *angles, \
          int64_t dims, void *cache), \
         (step, config, qkv, norms, angles, dims, cache)) \
    CASE(paged_attention, \
         (const Step *step, const AttentionConfig *config, const void *q, int64_t ldq, const void *cache, void *out), \
         (step, config, q, ldq, cache, out)) \
    CASE(rescore_top_k, \
         (float *logits, const void *x, const void *rows, int64_t m, int64_t n, int64_t k, int64_t count, \
          int64_t type, int64_t rows_type), \
         (logits, x, rows, m, n, k, count, type, rows_type))

/* The kernels of one instruction set. */
typedef struct {
    const char *name;
#define KERNEL_POINTER(kernel, parameters, arguments) int(*kernel) parameters;
    EACH_KERNEL(KERNEL_POINTER)
} Level;

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE size_t type_size(int64_t type) { return type == BF16 ? 2 : 4; }

/* Bytes of a key or value of d elements. In int8 its scale, a float, follows them. */
INLINE int64_t kv_bytes(int64_t d, int64_t type) { return type == I8 ? d + 4 : d * (int64_t)type_size(type); }

/* A format of packed weights. A new one is a row of FORMATS, a scale in pack.h and an entry of KERNELS in gemm.h. */
typedef struct {
    int per_word; /* weights in a word of 32 bits; k is padded to a multiple of it */
    int quantised; /* integers with a bf16 scale for each group, stored with an offset that makes them unsigned */
} Format;

static const Format FORMATS[] = {
    [W_F32] = {.per_word = 1},
    [W_BF16] = {.per_word = 2},
    [W_I8] = {.per_word = 4, .quantised = 1},
    [W_I4] = {.per_word = 8, .quantised = 1},
};

INLINE const Format *format_of(const Weights *w) { return &FORMATS[w->format]; }
INLINE int64_t padded_k(const Weights *w) { return round_up(w->k, format_of(w)->per_word); }

/* Bytes of a panel: for each group its scales, then its words. */
INLINE int64_t panel_bytes(const Weights *w)
{
    int64_t kp = padded_k(w), words = kp / format_of(w)->per_word * PANEL * 4;
    return format_of(w)->quantised ? kp / w->group * PANEL * 2 + words : words;
}

#endif
