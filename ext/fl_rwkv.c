/* RWKV's operators: channels or heads are divided among threads, tokens run one after another.  See
 * fl_kernels.h and fl_rwkv.h.
 */
#include "fl_parts.h"

typedef struct {
    const fl_engine *e;
    fl_share kind;
    const float *x, *last;
    const float *const *shares;
    int64_t n_mixes, n_tokens, n;
    float *out;
    int parts;
} mix_job;

static void mix_part(void *context, int part)
{
    const mix_job *j = context;
    int64_t rows = j->n_mixes * j->n_tokens;
    for (int64_t row = cut(rows, part, j->parts); row < cut(rows, part + 1, j->parts); row++) {
        int64_t t = row % j->n_tokens;
        const float *x = j->x + t * j->n, *before = t ? x - j->n : j->last;
        j->e->set->mix_tokens(j->kind, x, before, j->shares[row / j->n_tokens], (size_t)j->n,
                              j->out + row * j->n);
    }
}

void fl_op_mix_tokens(const fl_engine *e, fl_share kind, const float *x, const float *last,
                      const float *const *shares, int64_t n_mixes, int64_t n_tokens, int64_t n,
                      float *out)
{
    mix_job j = {e, kind, x, last, shares, n_mixes, n_tokens, n, out, 1};
    j.parts = parts_for(e, n_mixes * n_tokens, 2 * n, 1);
    fl_pool_run(e->pool, mix_part, &j, j.parts);
}

typedef struct {
    const fl_engine *e;
    const void *a;
    int64_t units;
    int parts;
} recurrence_job;

static void rwkv4_part(void *context, int part)
{
    const recurrence_job *j = context;
    j->e->set->rwkv4(j->a, (size_t)cut(j->units, part, j->parts),
                     (size_t)cut(j->units, part + 1, j->parts));
}

void fl_op_rwkv4(const fl_engine *e, const fl_rwkv4 *a)
{
    recurrence_job j = {e, a, a->n, parts_for(e, a->n, 64 * a->n_tokens, 1)};
    fl_pool_run(e->pool, rwkv4_part, &j, j.parts);
}

static void rwkv5_part(void *context, int part)
{
    const recurrence_job *j = context;
    int64_t end = cut(j->units, part + 1, j->parts);
    for (int64_t head = cut(j->units, part, j->parts); head < end; head++)
        j->e->set->rwkv5(j->a, (size_t)head);
}

void fl_op_rwkv5(const fl_engine *e, const fl_rwkv5 *a)
{
    recurrence_job j = {e, a, a->n_heads, 1};
    j.parts = parts_for(e, a->n_heads, 3 * a->n_tokens * a->head_dim * a->head_dim, 1);
    fl_pool_run(e->pool, rwkv5_part, &j, j.parts);
}

static void rwkv7_part(void *context, int part)
{
    const recurrence_job *j = context;
    int64_t end = cut(j->units, part + 1, j->parts);
    for (int64_t head = cut(j->units, part, j->parts); head < end; head++)
        j->e->set->rwkv7(j->a, (size_t)head);
}

void fl_op_rwkv7(const fl_engine *e, const fl_rwkv7 *a)
{
    recurrence_job j = {e, a, a->n_heads, 1};
    j.parts = parts_for(e, a->n_heads, 5 * a->n_tokens * a->head_dim * a->head_dim, 1);
    fl_pool_run(e->pool, rwkv7_part, &j, j.parts);
}
