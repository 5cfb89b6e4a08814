/* What the Python side and every instruction-set level agree on. */
#ifndef STRETTO_API_H
#define STRETTO_API_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define PANEL 32 /* outputs that lie side by side in packed weights */
#define MAX_K 65536 /* beyond it an int32 sum of int8 products could overflow */

enum { F32 = 0, BF16 = 1, I8 = 2 }; /* I8: keys and values alone */
enum { W_F32 = 0, W_BF16 = 1, W_I8 = 2, W_I4 = 3 };
enum { NORM_NONE = 0, NORM_HEAD = 1, NORM_ROW = 2 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum { OK = 0, NO_MEMORY = -1, BAD_SHAPE = -2 };

/* Packed weights of y = x W^T + bias. Panels of 32 outputs, each one stream over k; a group of k (quantised kinds)
 * starts with its 32 scales in bf16. `group` divides the padded k and equals it when a row has one scale. */
typedef struct {
    const uint8_t *data;
    const float *bias;
    int64_t n, k, group, format;
} Weights;

/* What the layers of a step share. Cache rows are [block, kv_head, offset, head_dim]: keys, then as many values.
 * `type` is that of activations, `kv_type` of the cache. */
typedef struct {
    const int64_t *positions, *slots; /* [tokens] */
    const int32_t *tables, *starts, *contexts; /* [sequences, width], [sequences + 1], [sequences] */
    int64_t tokens, sequences, width, blocks, block_size, type, kv_type;
} Step;

/* What is fixed about a kind of attention layer; window and softcap 0: none. */
typedef struct {
    int64_t heads, kv_heads, head_dim, norm, window;
    float scale, softcap, eps;
} AttentionConfig;

enum { CALL_LINEAR = 0, CALL_NORM = 1, CALL_ADD_NORM = 2, CALL_ACT_AND_MUL = 3, CALL_ROPE_AND_CACHE = 4, CALL_ATTENTION = 5 };

/* One call of a program: buffers by number, `of` its weights, `width` that of what it writes. */
typedef struct {
    const void *of;
    const AttentionConfig *config;
    int64_t call, source, target, width, layer, rotation, activation;
    float eps;
} Call;

/* What the calls of one run share. Buffer 1 is the residual. */
typedef struct {
    const Step *step;
    void *const *buffers;
    void *const *layers; /* of the cache */
    const float *const *angles;
    const int64_t *dims; /* rotated, of each rotation */
} Run;

typedef struct {
    const char *name;
    int (*pack)(const Weights *w, const void *source, int64_t type, uint8_t *data);
    int (*unpack)(const Weights *w, float *out);
    int (*linear)(const Weights *w, const void *x, void *y, int64_t m, int64_t type);
    int (*norm)(const void *x, void *residual, const void *weight, void *y, int64_t m, int64_t h, float eps,
                int64_t type);
    int (*act_and_mul)(const void *x, void *y, int64_t m, int64_t f, int64_t activation, int64_t type);
    int (*cos_sin)(const Step *step, const float *frequencies, int64_t pairs, float scale, float *angles);
    int (*rope_and_cache)(const Step *step, const AttentionConfig *config, void *qkv, const void *norms, const float *angles, int64_t dims,
                 void *cache);
    int (*paged_attention)(const Step *step, const AttentionConfig *config, const void *q, int64_t ldq, const void *cache, void *out);
    int (*rescore_top_k)(float *logits, const void *x, const void *rows, int64_t m, int64_t n, int64_t k, int64_t count,
                   int64_t type, int64_t rows_type);
} Level;

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE size_t type_size(int64_t type) { return type == BF16 ? 2 : 4; }

/* Bytes of a row of d keys or values. In int8 a float follows them: their scale. */
INLINE int64_t kv_bytes(int64_t d, int64_t type) { return type == I8 ? d + 4 : d * (int64_t)type_size(type); }

INLINE int64_t padded_k(int64_t kind, int64_t k)
{
    return kind == W_F32 ? k : round_up(k, kind == W_BF16 ? 2 : kind == W_I8 ? 4 : 8);
}

INLINE int64_t panel_bytes(int64_t kind, int64_t k, int64_t group)
{
    int64_t kp = padded_k(kind, k);
    if (kind == W_F32)
        return kp * PANEL * 4;
    if (kind == W_BF16)
        return kp * PANEL * 2;
    return kp / group * (PANEL * 2) + (kind == W_I8 ? kp * PANEL : kp * PANEL / 2);
}

#endif
