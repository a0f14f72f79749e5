/* Operators: find the items, divide the outputs, call the kernel set.  See fl_kernels.h.
 *
 * Threads split outputs (items, columns, rows, heads), never a sum; a kernel's result for one
 * output does not depend on its neighbours in a call, so any division gives the same bits.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "fl_parts.h"
#include "fl_quant.h"

/* Rows handed to a kernel at once: pointers on the stack, enough to forget the call; of a matrix so
 * many that a kernel can ask for rows ahead. */
enum { ROWS = 64, MATRIX_ROWS = 4 * FL_MANY_ROWS };
enum { MAX_HEAD_DIM = 576 }; /* a latent of 512 and 64 that turn */

/* --------------------------------------------------------------------------------------- items */

/* Pointers to the pieces of items k..k+n-1 of the list. */
fl_kernel_status fl_resolve(const fl_piece *piece, const fl_items *items, int64_t k, int64_t n,
                            const uint8_t **rows)
{
    int64_t frame = 0, first = 0, stop = 0; /* the frame found last, and the items it holds */
    const uint8_t *base = NULL;
    for (int64_t i = 0; i < n; i++, k++) {
        const int64_t id = items->ids ? items->ids[k] : items->start + k;
        if (id < first || id >= stop) { /* a division takes as long as 40 bytes of a row */
            frame = id / piece->per_frame;
            if (id < 0 || frame >= items->n_frames) return FL_OUT_OF_RANGE;
            const uint64_t address = items->addresses[frame];
            if (address == 0) return FL_ABSENT_FRAME;
            if (address % 16 != 0) return FL_MISALIGNED;
            base = (const uint8_t *)(uintptr_t)address + piece->offset;
            first = frame * piece->per_frame;
            stop = first + piece->per_frame;
        }
        rows[i] = base + (id - first) * piece->stride;
    }
    return FL_KERNEL_OK;
}

fl_kernel_status fl_ascending(const fl_items *items)
{
    for (int64_t k = 1; items->ids && k < items->n; k++)
        if (items->ids[k] <= items->ids[k - 1]) return FL_NOT_ASCENDING;
    return FL_KERNEL_OK;
}

/* ------------------------------------------------------------------------------------- prepare */

typedef struct {
    const fl_engine *e;
    const float *x;
    int64_t n_tokens, n_cols;
    uint8_t *q;
    int64_t q_stride;
    float *scales;
    int64_t scale_stride;
    uint8_t *tiles;
    int parts;
} prepare_job;

static void prepare_part(void *context, int part)
{
    const prepare_job *j = context;
    const int64_t unit = j->tiles ? FL_MANY : 1, units = (j->n_tokens + unit - 1) / unit;
    const int64_t end = smaller(j->n_tokens, cut(units, part + 1, j->parts) * unit);
    for (int64_t t = cut(units, part, j->parts) * unit; t < end; t++) {
        fl_quantise(j->x + t * j->n_cols, (size_t)j->n_cols, j->q + t * j->q_stride,
                    (size_t)j->q_stride, j->scales + t * j->scale_stride, (size_t)j->scale_stride);
        if (j->tiles && (t + 1) % FL_MANY == 0) {
            const int64_t from = t + 1 - FL_MANY;
            j->e->set->pack_many(j->q + from * j->q_stride, (size_t)j->q_stride,
                                 j->scales + from * j->scale_stride, (size_t)j->scale_stride,
                                 j->tiles + from * (j->q_stride + 4 * j->scale_stride));
        }
    }
}

void fl_op_prepare(const fl_engine *e, const float *x, int64_t n_tokens, int64_t n_cols, uint8_t *q,
                   int64_t q_stride, float *scales, int64_t scale_stride, uint8_t *tiles)
{
    const int64_t unit = tiles ? FL_MANY : 1;
    prepare_job j = {e, x, n_tokens, n_cols, q, q_stride, scales, scale_stride, tiles, 1};
    j.parts = parts_for(e, (n_tokens + unit - 1) / unit, n_cols * 4 * unit, 1);
    fl_pool_run(e->pool, prepare_part, &j, j.parts);
}

int fl_many(const fl_engine *e) { return e->set->pack_many ? FL_MANY : 0; }

int64_t fl_tiles_at(const fl_engine *e, const uint8_t *q, int64_t n_bytes, int64_t n_tokens,
                    int64_t q_stride, int64_t scale_stride)
{
    if (!fl_many(e) || n_tokens < FL_MANY || q_stride > FL_MANY_COLS) return 0;
    /* Whole lines: a vector of them must not lie in two. */
    const int64_t at = n_tokens * q_stride + (int64_t)(-(uintptr_t)q % 64);
    const int64_t n = n_tokens / FL_MANY * FL_MANY * (q_stride + 4 * scale_stride);
    return at + n <= n_bytes ? at : 0;
}

/* ---------------------------------------------------------------------------------------- dots */

typedef struct {
    const fl_engine *e;
    const fl_acts *acts;
    const fl_piece *piece;
    const fl_items *items;
    float *out;
    int64_t out_stride;
    int parts;
    _Atomic int status;
} dot_job;

/* Whole blocks of tokens at once where the set can, and the others. */
static void dot_rows(const dot_job *j, const uint8_t *const *rows, int64_t n, float *out)
{
    const fl_kernel_set *set = j->e->set;
    const int64_t type = j->piece->weight_type;
    fl_acts rest = *j->acts;
    if (rest.tiles && set->dot_many[type]) {
        const int64_t whole = rest.n_tokens / FL_MANY * FL_MANY;
        set->dot_many[type](&rest, rows, (size_t)n, out, (size_t)j->out_stride);
        rest.x += whole * rest.n_cols;
        rest.q += whole * rest.q_stride;
        rest.scales += whole * rest.scale_stride;
        rest.n_tokens -= whole;
        out += whole * j->out_stride;
    }
    if (rest.n_tokens) set->dot[type](&rest, rows, (size_t)n, out, (size_t)j->out_stride);
}

static void dot_part(void *context, int part)
{
    dot_job *j = context;
    const uint8_t *rows[MATRIX_ROWS];
    int64_t end = cut(j->items->n, part + 1, j->parts);
    for (int64_t k = cut(j->items->n, part, j->parts); k < end; k += MATRIX_ROWS) {
        int64_t n = smaller(MATRIX_ROWS, end - k);
        fl_kernel_status status = fl_resolve(j->piece, j->items, k, n, rows);
        if (status != FL_KERNEL_OK) {
            atomic_store(&j->status, status);
            return;
        }
        dot_rows(j, rows, n, j->out + k);
    }
}

fl_kernel_status fl_op_dot(const fl_engine *e, const fl_acts *acts, const fl_piece *piece,
                           const fl_items *items, float *out, int64_t out_stride)
{
    if (fl_ascending(items) != FL_KERNEL_OK) return FL_NOT_ASCENDING;
    dot_job j = {e, acts, piece, items, out, out_stride, 1, FL_KERNEL_OK};
    /* Of a long pass one thread may be through sooner; the others' rest should be short. */
    j.parts = parts_for(e, items->n, acts->n_tokens * acts->n_cols, acts->tiles ? 16 : 4);
    fl_pool_run(e->pool, dot_part, &j, j.parts);
    return (fl_kernel_status)atomic_load(&j.status);
}

/* ------------------------------------------------------------------------------- rows of bits */

typedef struct {
    const fl_engine *e;
    const fl_acts *acts;
    const uint8_t *rows;
    int64_t n_rows, n_planes;
    float *out;
    int parts;
} low_bit_job;

static void low_bit_part(void *context, int part)
{
    const low_bit_job *j = context;
    int64_t first = cut(j->n_rows, part, j->parts), end = cut(j->n_rows, part + 1, j->parts);
    int64_t row_bytes = j->n_planes * (j->acts->q_stride / 8);
    j->e->set->low_bit(j->acts, j->rows + first * row_bytes, (size_t)(end - first),
                       (size_t)j->n_planes, j->out + first);
}

void fl_op_low_bit(const fl_engine *e, const fl_acts *acts, const uint8_t *rows, int64_t n_rows,
                   int64_t n_planes, float *out)
{
    low_bit_job j = {e, acts, rows, n_rows, n_planes, out, 1};
    j.parts = parts_for(e, n_rows, acts->n_cols, 4);
    fl_pool_run(e->pool, low_bit_part, &j, j.parts);
}

/* ---------------------------------------------------------------------------------- accumulate */

typedef struct {
    const fl_engine *e;
    const float *coef;
    int64_t coef_stride, n_tokens;
    const fl_piece *piece;
    const fl_items *items;
    float *y;
    int64_t y_stride;
    int parts;
    _Atomic int status;
} accumulate_job;

/* Blocks of tokens and whole groups of columns at once where the set can, and the others. */
static void add_rows(const accumulate_job *j, int64_t k, const uint8_t *const *rows, int64_t n,
                     int64_t first, int64_t last)
{
    const fl_kernel_set *set = j->e->set;
    const int64_t type = j->piece->weight_type;
    const size_t n_cols = (size_t)j->piece->n_cols, y_stride = (size_t)j->y_stride;
    const size_t coef_stride = (size_t)j->coef_stride;
    const float *coef = j->coef + k;
    int64_t many = 0;
    if (set->sum_many[type] && n >= FL_SUM_TOKENS) {
        const int64_t whole = first + (last - first) / FL_GROUP * FL_GROUP;
        many = j->n_tokens / FL_SUM_TOKENS * FL_SUM_TOKENS;
        if (many && whole > first)
            set->sum_many[type](coef, coef_stride, (size_t)many, rows, (size_t)n, n_cols,
                                (size_t)first, (size_t)whole, j->y, y_stride);
        if (many && whole < last)
            set->accumulate[type](coef, coef_stride, (size_t)many, rows, (size_t)n, n_cols,
                                  (size_t)whole, (size_t)last, j->y, y_stride);
    }
    if (many < j->n_tokens)
        set->accumulate[type](coef + many * j->coef_stride, coef_stride,
                              (size_t)(j->n_tokens - many), rows, (size_t)n, n_cols, (size_t)first,
                              (size_t)last, j->y + many * j->y_stride, y_stride);
}

static void accumulate_part(void *context, int part)
{
    accumulate_job *j = context;
    const uint8_t *rows[MATRIX_ROWS];
    int64_t n_cols = j->piece->n_cols, groups = (n_cols + FL_GROUP - 1) / FL_GROUP;
    int64_t first = cut(groups, part, j->parts) * FL_GROUP;
    int64_t last = smaller(n_cols, cut(groups, part + 1, j->parts) * FL_GROUP);
    for (int64_t k = 0; k < j->items->n; k += MATRIX_ROWS) {
        int64_t n = smaller(MATRIX_ROWS, j->items->n - k);
        fl_kernel_status status = fl_resolve(j->piece, j->items, k, n, rows);
        if (status != FL_KERNEL_OK) {
            atomic_store(&j->status, status);
            return;
        }
        add_rows(j, k, rows, n, first, last);
    }
}

fl_kernel_status fl_op_accumulate(const fl_engine *e, const float *coef, int64_t coef_stride,
                                  int64_t n_tokens, const fl_piece *piece, const fl_items *items,
                                  float *y, int64_t y_stride)
{
    if (fl_ascending(items) != FL_KERNEL_OK) return FL_NOT_ASCENDING;
    accumulate_job j = {e, coef, coef_stride, n_tokens, piece, items, y, y_stride, 1, FL_KERNEL_OK};
    int64_t groups = (piece->n_cols + FL_GROUP - 1) / FL_GROUP;
    /* One part per thread: narrower columns would break up sequential reads of the rows.  Many tokens
     * are not bound by reading; four were no faster. */
    const int most = e->set->sum_many[piece->weight_type] && n_tokens >= FL_SUM_TOKENS ? 2 : 1;
    j.parts = parts_for(e, groups, items->n * n_tokens * FL_GROUP, most);
    fl_pool_run(e->pool, accumulate_part, &j, j.parts);
    return (fl_kernel_status)atomic_load(&j.status);
}

/* --------------------------------------------------------------------------------- decode, rows */

fl_kernel_status fl_op_decode(const fl_engine *e, const fl_piece *piece, const fl_items *items,
                              float *out)
{
    for (int64_t k = 0; k < items->n; k++) {
        const uint8_t *row;
        fl_kernel_status status = fl_resolve(piece, items, k, 1, &row);
        if (status != FL_KERNEL_OK) return status;
        e->set->decode[piece->weight_type](row, (size_t)piece->n_cols, out + k * piece->n_cols);
    }
    return FL_KERNEL_OK;
}

void fl_op_rms_norm(const fl_engine *e, const float *x, const float *weight, int64_t n_rows,
                    int64_t n, float eps, float *out)
{
    for (int64_t r = 0; r < n_rows; r++)
        e->set->rms_norm(x + r * n, weight, (size_t)n, eps, out + r * n);
}

void fl_op_layer_norm(const fl_engine *e, const float *x, const float *weight, const float *bias,
                      int64_t n_rows, int64_t n, float eps, float *out)
{
    for (int64_t r = 0; r < n_rows; r++)
        e->set->layer_norm(x + r * n, weight, bias, (size_t)n, eps, out + r * n);
}

void fl_op_rope(const fl_engine *e, float *x, const float *cosines, const float *sines,
                int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t half)
{
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t h = 0; h < n_heads; h++)
            e->set->rope(x + (t * n_heads + h) * head_dim, cosines + t * half, sines + t * half,
                         (size_t)half);
}

/* ---------------------------------------------------------------------------------- activations */

typedef struct {
    const fl_engine *e;
    fl_activation kind;
    const float *pre, *up;
    int64_t n;
    float *out;
    int parts;
} activate_job;

static void activate_part(void *context, int part)
{
    const activate_job *j = context;
    int64_t first = cut(j->n, part, j->parts), n = cut(j->n, part + 1, j->parts) - first;
    j->e->set->activate(j->kind, j->pre + first, j->up ? j->up + first : NULL, (size_t)n,
                        j->out + first);
}

void fl_op_activate(const fl_engine *e, fl_activation kind, const float *pre, const float *up,
                    int64_t n, float *out)
{
    activate_job j = {e, kind, pre, up, n, out, parts_for(e, n, 8, 1)};
    fl_pool_run(e->pool, activate_part, &j, j.parts);
}

int64_t fl_op_active_ids(const float *pre, const float *cut, int64_t n_tokens, int64_t n,
                         int32_t *out)
{
    enum { BLOCK = 256 }; /* flags of one block stay in registers and L1 */
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t width = smaller(BLOCK, n - first);
        uint8_t active[BLOCK] = {0};
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *row = pre + t * n + first;
            for (int64_t i = 0; i < width; i++)
                active[i] |= row[i] > (cut ? cut[first + i] : 0.0f);
        }
        for (int64_t i = 0; i < width; i++)
            if (active[i]) out[found++] = (int32_t)(first + i);
    }
    return found;
}

/* ------------------------------------------------------------------------------------ attention
 *
 * A block is up to four (token, head) pairs that share a KV head, so that a key is widened once for
 * all of them.  Each pair's own range of keys decides what enters its sums: the common range goes
 * through the kernels for all pairs together, the ragged ends pair by pair; both give the same
 * bits.
 */

typedef struct {
    const fl_engine *e;
    const fl_attention *a;
    int64_t blocks_per_head;
    int parts;
} attention_job;

typedef struct {
    const uint8_t *keys, *values; /* of this KV head */
    int64_t row_bytes;
    int n_queries;
    int64_t lo[FL_MAX_QUERIES], hi[FL_MAX_QUERIES]; /* absolute key positions */
    int64_t base; /* position of scores[0]: the least lo, down to a multiple of 16 */
    float *scores;
    int64_t score_stride;
} query_block;

static int64_t score_stride(int64_t n_context) { return (n_context + 15) / 16 * 16 + 16; }

int64_t fl_attention_scratch(int64_t n_context) { return FL_MAX_QUERIES * score_stride(n_context); }

static int64_t rows_from(const uint8_t *data, int64_t row_bytes, int64_t j, int64_t end,
                         const uint8_t **rows)
{
    int64_t n = smaller(ROWS, end - j);
    for (int64_t i = 0; i < n; i++) rows[i] = data + (j + i) * row_bytes;
    return n;
}

/* y[first..first+n) += sum over keys lo..hi-1 of weight * value. */
static void sum_values(const fl_attention *a, const fl_kernel_set *set, const query_block *b,
                       int first, int n, int64_t lo, int64_t hi, float *y)
{
    const uint8_t *rows[ROWS];
    for (int64_t j = lo; j < hi; j += ROWS) {
        int64_t n_rows = rows_from(b->values, b->row_bytes, j, hi, rows);
        set->accumulate[a->kv_type](b->scores + first * b->score_stride + (j - b->base),
                                    (size_t)b->score_stride, (size_t)n, rows, (size_t)n_rows,
                                    (size_t)a->head_dim, 0, (size_t)a->head_dim,
                                    y + first * a->head_dim, (size_t)a->head_dim);
    }
}

/* cap * tanh(score * scale / cap): libm in float64, rounded once, the same in every set. */
static void cap_scores(float *scores, int64_t n, float scale, float cap)
{
    for (int64_t i = 0; i < n; i++)
        scores[i] = (float)(cap * tanh((double)(scores[i] * scale) / cap));
}

static void attend_block(const fl_attention *a, const fl_kernel_set *set, const query_block *b,
                         const float *queries, float *y)
{
    int64_t least = b->lo[0], most = b->hi[0], common_lo = b->lo[0], common_hi = b->hi[0];
    for (int i = 1; i < b->n_queries; i++) {
        least = smaller(least, b->lo[i]);
        most = larger(most, b->hi[i]);
        common_lo = larger(common_lo, b->lo[i]);
        common_hi = smaller(common_hi, b->hi[i]);
    }
    const uint8_t *rows[ROWS];
    fl_acts acts = {.x = queries, .n_tokens = b->n_queries, .n_cols = a->head_dim};
    for (int64_t j = least; j < most; j += ROWS) {
        int64_t n_rows = rows_from(b->keys, b->row_bytes, j, most, rows);
        set->dot[a->kv_type](&acts, rows, (size_t)n_rows, b->scores + (j - b->base),
                             (size_t)b->score_stride);
    }
    float inverse[FL_MAX_QUERIES];
    for (int i = 0; i < b->n_queries; i++) {
        float *scores = b->scores + i * b->score_stride;
        int64_t from = b->lo[i] - b->base, to = b->hi[i] - b->base;
        if (a->cap > 0) cap_scores(scores + from, to - from, a->scale, a->cap);
        inverse[i] = set->softmax(scores, (size_t)from, (size_t)to, a->cap > 0 ? 1 : a->scale);
    }

    memset(y, 0, (size_t)(b->n_queries * a->head_dim) * sizeof *y);
    int shared = common_lo < common_hi;
    for (int i = 0; i < b->n_queries; i++)
        sum_values(a, set, b, i, 1, b->lo[i], shared ? common_lo : b->hi[i], y);
    if (shared) {
        sum_values(a, set, b, 0, b->n_queries, common_lo, common_hi, y);
        for (int i = 0; i < b->n_queries; i++) sum_values(a, set, b, i, 1, common_hi, b->hi[i], y);
    }
    for (int i = 0; i < b->n_queries; i++)
        set->scale_by(y + i * a->head_dim, (size_t)a->head_dim, inverse[i]);
}

static void attention_part(void *context, int part)
{
    const attention_job *j = context;
    const fl_attention *a = j->a;
    int64_t group = a->n_heads / a->n_kv_heads, D = a->head_dim;
    size_t head_bytes = (size_t)D * sizeof(float);
    float queries[FL_MAX_QUERIES * MAX_HEAD_DIM], y[FL_MAX_QUERIES * MAX_HEAD_DIM];
    query_block b = {.row_bytes = D * (a->kv_type == FL_F16 ? 2 : 4),
                     .scores = a->scratch + part * fl_attention_scratch(a->n_context),
                     .score_stride = score_stride(a->n_context)};
    /* Strided over blocks: later tokens see more keys, so neighbours cost alike. */
    for (int64_t unit = part; unit < a->n_kv_heads * j->blocks_per_head; unit += j->parts) {
        int64_t kv_head = unit % a->n_kv_heads;
        int64_t first = unit / a->n_kv_heads * FL_MAX_QUERIES;
        b.n_queries = (int)smaller(FL_MAX_QUERIES, a->n_tokens * group - first);
        b.keys = a->k + kv_head * a->n_context * b.row_bytes;
        b.values = a->v + kv_head * a->n_context * b.row_bytes;
        for (int i = 0; i < b.n_queries; i++) {
            int64_t t = (first + i) / group, h = kv_head * group + (first + i) % group;
            int64_t position = a->first_position + t;
            b.hi[i] = position + 1;
            b.lo[i] = a->window ? larger(0, b.hi[i] - a->window) : 0;
            memcpy(queries + i * D, a->q + (t * a->n_heads + h) * D, head_bytes);
        }
        b.base = b.lo[0] / 16 * 16; /* tokens ascend, so the first pair has the least lo */
        attend_block(a, j->e->set, &b, queries, y);
        for (int i = 0; i < b.n_queries; i++) {
            int64_t t = (first + i) / group, h = kv_head * group + (first + i) % group;
            memcpy(a->out + (t * a->n_heads + h) * D, y + i * D, head_bytes);
        }
    }
}

void fl_op_attention(const fl_engine *e, const fl_attention *a)
{
    int64_t queries = a->n_tokens * (a->n_heads / a->n_kv_heads);
    attention_job j = {e, a, (queries + FL_MAX_QUERIES - 1) / FL_MAX_QUERIES, 1};
    int64_t keys = a->first_position + a->n_tokens;
    /* One part per thread, because each owns a piece of the scratch. */
    j.parts =
        parts_for(e, a->n_kv_heads * j.blocks_per_head, FL_MAX_QUERIES * 2 * keys * a->head_dim, 1);
    fl_pool_run(e->pool, attention_part, &j, j.parts);
}
