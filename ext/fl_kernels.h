/* The kernel line: what Python hands over, what a kernel set offers, what comes back.
 *
 * Two layers.  fl_ops_* (fl_ops.c) are what the .pyx calls, one crossing per operator: they find
 * the items, divide the outputs among threads and call one kernel set.  A kernel set (serial.c,
 * avx2.c, avx512.c, neon.c) is a table of loops over plain rows; it knows neither frames nor
 * threads.  Nothing here allocates, prints, exits or reads the environment.  The order of every sum
 * is in docs/ARITHMETIC.md.
 */
#ifndef FL_KERNELS_H
#define FL_KERNELS_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#include "fl_pool.h"
#include "fl_rwkv.h"

enum { FL_F32 = 0, FL_F16 = 1, FL_BF16 = 2, FL_INT8 = 3, FL_INT4 = 4, FL_N_WEIGHT_TYPES = 5 };
enum { FL_GROUP = 32 };      /* columns per scale of the integer types */
enum { FL_MAX_QUERIES = 4 }; /* (token, head) pairs that share one pass over keys */

typedef enum {
    FL_KERNEL_OK = 0,
    FL_ABSENT_FRAME = 1,  /* addresses[frame] is 0 */
    FL_OUT_OF_RANGE = 2,  /* an id beyond the table, or negative */
    FL_NOT_ASCENDING = 3, /* ids must ascend strictly */
    FL_MISALIGNED = 4,    /* addresses[frame] is no multiple of 16 */
    FL_NO_POSITION = 5    /* beyond the context's tables */
} fl_kernel_status;

typedef enum {
    FL_SILU, FL_RELU, FL_RELU2, FL_GELU, FL_GELU_TANH, FL_SIGMOID, FL_TANH
} fl_activation;

/* One piece of the items of a plane; checked by kernels.base.PieceView before it comes here. */
typedef struct {
    int64_t weight_type;
    int64_t per_frame; /* items in a frame */
    int64_t stride;    /* bytes from item to item, a multiple of 16 */
    int64_t offset;    /* of the piece inside its item, a multiple of 16 */
    int64_t n_cols;
} fl_piece;
static_assert(sizeof(fl_piece) == 40, "fl_piece is five int64");

/* Items start..start+n-1, or ids[0..n-1] where ids is given. */
typedef struct {
    const uint64_t *addresses; /* of each decoded frame; 0 where it is absent */
    int64_t n_frames;
    const int32_t *ids;
    int64_t start;
    int64_t n;
} fl_items;
static_assert(sizeof(fl_items) == 40, "fl_items is five words");

/* T tokens, prepared for dots: x as it is for float rows; q and scales for integer rows. */
typedef struct {
    const float *x;      /* [n_tokens, n_cols] */
    const uint8_t *q;    /* [n_tokens, q_stride]: int8; padding is 0 */
    const float *scales; /* [n_tokens, scale_stride]; padding is 0 */
    int64_t n_tokens;
    int64_t n_cols;
    int64_t q_stride;     /* n_cols rounded up to 64: whole vectors may be read */
    int64_t scale_stride; /* groups rounded up to 16 */
    uint8_t *tiles;       /* q and scales again, as set->pack_many has them; or NULL */
} fl_acts;
static_assert(sizeof(fl_acts) == 64, "fl_acts is eight words");

/* rows: n_rows pointers to rows of acts->n_cols; out[t * out_stride + r]. */
typedef void (*fl_dot_fn)(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows,
                          float *out, size_t out_stride);

/* The whole blocks of FL_MANY tokens of `acts`, whose `tiles` are made; n_cols <= FL_MANY_COLS. */
enum { FL_MANY = 16, FL_MANY_COLS = 8192, FL_SUM_TOKENS = 8, FL_MANY_ROWS = 96 };
/* One such block of acts->tiles: FL_MANY * (q_stride + 4 * scale_stride) bytes. */
typedef void (*fl_pack_fn)(const uint8_t *q, size_t q_stride, const float *scales,
                           size_t scale_stride, uint8_t *tile);

/* y[t * y_stride + c] += sum over rows of coef[t * coef_stride + r] * row[r][c], for columns c in
 * [first, last); first is a multiple of 32. */
typedef void (*fl_accumulate_fn)(const float *coef, size_t coef_stride, size_t n_tokens,
                                 const uint8_t *const *rows, size_t n_rows, size_t n_cols,
                                 size_t first, size_t last, float *y, size_t y_stride);

/* Rows of a few bits a column, for one token: out[r] = sum over groups of scale * sum of q * level,
 * with the odd levels 2 * code - (2^n_planes - 1).  A row is n_planes planes of q_stride / 8 bytes,
 * the low bits first; bit c % 8 of byte c / 8 is column c's.  Bits past n_cols meet q = 0. */
typedef void (*fl_low_bit_fn)(const fl_acts *acts, const uint8_t *rows, size_t n_rows,
                              size_t n_planes, float *out);
enum { FL_MAX_PLANES = 6 };

typedef void (*fl_decode_fn)(const uint8_t *row, size_t n_cols, float *out);

typedef struct {
    const char *name;
    fl_dot_fn dot[FL_N_WEIGHT_TYPES];
    fl_accumulate_fn accumulate[FL_N_WEIGHT_TYPES];
    fl_decode_fn decode[FL_N_WEIGHT_TYPES];
    fl_low_bit_fn low_bit;
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float eps,
                       float *out);
    /* One head of one token, in place. */
    void (*rope)(float *x, const float *cosines, const float *sines, size_t half);
    /* scores[lo..hi) -> exp(score * scale - max); returns 1 / sum.  scores[0] is position 0 of a
     * multiple of 16 at or below lo: `lo` counts from there. */
    float (*softmax)(float *scores, size_t lo, size_t hi, float scale);
    void (*scale_by)(float *y, size_t n, float factor);
    /* up may be NULL. */
    void (*activate)(fl_activation kind, const float *pre, const float *up, size_t n, float *out);
    /* One token of one mix; channels from..to-1 of all tokens; one head of all tokens. */
    void (*mix_tokens)(fl_share kind, const float *x, const float *before, const float *share,
                       size_t n, float *out);
    void (*rwkv4)(const fl_rwkv4 *a, size_t from, size_t to);
    void (*rwkv5)(const fl_rwkv5 *a, size_t head);
    void (*rwkv7)(const fl_rwkv7 *a, size_t head);
    /* Of sets that have a way of their own for FL_MANY tokens at once, else NULL. */
    fl_dot_fn dot_many[FL_N_WEIGHT_TYPES];
    fl_accumulate_fn sum_many[FL_N_WEIGHT_TYPES];
    fl_pack_fn pack_many;
} fl_kernel_set;

extern const fl_kernel_set fl_serial;
/* The serial loop, for sets that have none of their own. */
void fl_serial_low_bit(const fl_acts *acts, const uint8_t *rows, size_t n_rows, size_t n_planes,
                       float *out);
#if defined(__x86_64__)
#define FL_HAVE_X86 1
extern const fl_kernel_set fl_avx2, fl_avx512;
#endif
#if defined(__aarch64__)
#define FL_HAVE_NEON 1
extern const fl_kernel_set fl_neon;
#endif

/* fl_dispatch.c: the table of a set that this processor and operating system can run, or NULL with
 * the reason in *why (a constant text). */
const fl_kernel_set *fl_find_kernel_set(const char *name, const char **why);

/* fl_ops.c.  `pool` may be NULL: the calling thread does everything. */
typedef struct {
    const fl_kernel_set *set;
    fl_pool *pool;
} fl_engine;

void fl_op_prepare(const fl_engine *e, const float *x, int64_t n_tokens, int64_t n_cols, uint8_t *q,
                   int64_t q_stride, float *scales, int64_t scale_stride, uint8_t *tiles);
/* Tokens of the blocks of fl_acts.tiles, or 0 where the set has none. */
int fl_many(const fl_engine *e);
/* Where the tiles of n_tokens begin in the n_bytes at q, behind their q; 0 where there are none. */
int64_t fl_tiles_at(const fl_engine *e, const uint8_t *q, int64_t n_bytes, int64_t n_tokens,
                    int64_t q_stride, int64_t scale_stride);
fl_kernel_status fl_op_dot(const fl_engine *e, const fl_acts *acts, const fl_piece *piece,
                           const fl_items *items, float *out, int64_t out_stride);
fl_kernel_status fl_op_accumulate(const fl_engine *e, const float *coef, int64_t coef_stride,
                                  int64_t n_tokens, const fl_piece *piece, const fl_items *items,
                                  float *y, int64_t y_stride);
/* The items of a list as the kernels take them: pointers to the pieces of items k..k+n-1 of it, and
 * whether its ids ascend. */
fl_kernel_status fl_resolve(const fl_piece *piece, const fl_items *items, int64_t k, int64_t n,
                            const uint8_t **rows);
fl_kernel_status fl_ascending(const fl_items *items);

/* fl_neurons.c: for one token, of every neuron k in ascending order
 *   y += act(pre[k]) * up[k] * its down piece,
 * pre[k] = its first piece . x, up[k] = its second piece . x.  Without a first piece pre is given;
 * without a second there is no up.  Both pieces, where there are both, are of one type.  pre and up
 * are [items->n]; pre holds the factors afterwards. */
typedef struct {
    const fl_acts *acts;
    const fl_piece *first, *second, *down;
    const fl_items *items;
    fl_activation kind;
    float *pre, *up, *y;
} fl_neurons;
fl_kernel_status fl_op_neurons(const fl_engine *e, const fl_neurons *a);

void fl_op_low_bit(const fl_engine *e, const fl_acts *acts, const uint8_t *rows, int64_t n_rows,
                   int64_t n_planes, float *out);
fl_kernel_status fl_op_decode(const fl_engine *e, const fl_piece *piece, const fl_items *items,
                              float *out);
void fl_op_rms_norm(const fl_engine *e, const float *x, const float *weight, int64_t n_rows,
                    int64_t n, float eps, float *out);
void fl_op_layer_norm(const fl_engine *e, const float *x, const float *weight, const float *bias,
                      int64_t n_rows, int64_t n, float eps, float *out);
void fl_op_rope(const fl_engine *e, float *x, const float *cosines, const float *sines,
                int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t half);
void fl_op_activate(const fl_engine *e, fl_activation kind, const float *pre, const float *up,
                    int64_t n, float *out);
/* The i, ascending, with pre[i] > cut[i], or > 0 without a cut, for any token; how many. */
int64_t fl_op_active_ids(const float *pre, const float *cut, int64_t n_tokens, int64_t n,
                         int32_t *out);

typedef struct {
    const float *q;       /* [n_tokens, n_heads, head_dim] */
    const uint8_t *k, *v; /* [n_kv_heads, n_context, head_dim] */
    int64_t kv_type;      /* FL_F32 or FL_F16 */
    int64_t n_tokens, n_heads, n_kv_heads, head_dim, n_context;
    int64_t first_position;
    int64_t window; /* 0: none */
    float scale;
    float cap; /* soft cap of the scores; 0: none */
    float *scratch; /* parts x fl_attention_scratch(...) floats */
    float *out;     /* [n_tokens, n_heads * head_dim] */
} fl_attention;

/* Floats of scratch per thread. */
int64_t fl_attention_scratch(int64_t n_context);
void fl_op_attention(const fl_engine *e, const fl_attention *a);

/* fl_token.c.  prepare (where q is given) and dot: acts->q and acts->scales are q and scales. */
fl_kernel_status fl_op_linear(const fl_engine *e, const fl_acts *acts, uint8_t *q, float *scales,
                              const fl_piece *piece, const fl_items *items, float *out,
                              int64_t out_stride);
/* x += added, and its norm. */
void fl_op_add_rms_norm(const fl_engine *e, float *x, const float *added, const float *weight,
                        int64_t n_rows, int64_t n, float eps, float *out);
/* Attention of one token: q and k are turned in place (half > 0), k and v kept at the attention's
 * first_position of `keys` and `values`, which are the attention's k and v. */
typedef struct {
    fl_attention attention;
    float *q, *k;
    const float *v, *cosines, *sines;
    int64_t half;
    uint8_t *keys, *values;
} fl_token;
void fl_op_attend_token(const fl_engine *e, const fl_token *t);
/* Neurons of a list of ids by their pre-activations decided[id].  With a deciding piece those are
 * made first - its dot with x, plus bias[id] where there is a bias -, and only neurons above zero
 * are added.  `neurons` says what and where, but for its first piece and its items; pre, up and
 * active have room for all ids.  *n_added: how many were. */
typedef struct {
    fl_neurons neurons;
    const fl_items *items;
    const fl_piece *deciding;
    const float *bias;
    float *decided;
    int64_t n_decided;
    int32_t *active;
} fl_decided;
fl_kernel_status fl_op_decided(const fl_engine *e, const fl_decided *d, int64_t *n_added);

/* fl_rwkv.c.  shares: n_mixes vectors of n; out [n_mixes, n_tokens, n]. */
void fl_op_mix_tokens(const fl_engine *e, fl_share kind, const float *x, const float *last,
                      const float *const *shares, int64_t n_mixes, int64_t n_tokens, int64_t n,
                      float *out);
void fl_op_rwkv4(const fl_engine *e, const fl_rwkv4 *a);
void fl_op_rwkv5(const fl_engine *e, const fl_rwkv5 *a);
void fl_op_rwkv7(const fl_engine *e, const fl_rwkv7 *a);

#endif
