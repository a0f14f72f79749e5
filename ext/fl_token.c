/* What happens between the matrices of one token, in one call each: every call into the interpreter
 * that is spared is one that finds its code pushed out of the cache by weights.
 *
 * Every number is the one that the operators make one after the other. */
#include <string.h>

#include "fl_kernels.h"
#include "fl_quant.h"

fl_kernel_status fl_op_linear(const fl_engine *e, const fl_acts *acts, uint8_t *q, float *scales,
                              const fl_piece *piece, const fl_items *items, float *out,
                              int64_t out_stride)
{
    if (q)
        fl_op_prepare(e, acts->x, acts->n_tokens, acts->n_cols, q, acts->q_stride, scales,
                      acts->scale_stride, acts->tiles);
    return fl_op_dot(e, acts, piece, items, out, out_stride);
}

void fl_op_add_rms_norm(const fl_engine *e, float *x, const float *added, const float *weight,
                        int64_t n_rows, int64_t n, float eps, float *out)
{
    for (int64_t i = 0; i < n_rows * n; i++) x[i] += added[i];
    fl_op_rms_norm(e, x, weight, n_rows, n, eps, out);
}

/* Row `position` of every head of [n_kv_heads, n_context, head_dim] becomes `row`'s. */
static void keep(const fl_attention *a, const float *row, uint8_t *kept)
{
    const int64_t size = a->kv_type == FL_F16 ? 2 : 4, n = a->head_dim;
    for (int64_t h = 0; h < a->n_kv_heads; h++, row += n) {
        uint8_t *at = kept + (h * a->n_context + a->first_position) * n * size;
        if (a->kv_type == FL_F16)
            for (int64_t i = 0; i < n; i++) fl_store_f16(at + 2 * i, row[i]);
        else
            memcpy(at, row, (size_t)(n * size));
    }
}

void fl_op_attend_token(const fl_engine *e, const fl_token *t)
{
    const fl_attention *a = &t->attention;
    if (t->half) {
        fl_op_rope(e, t->q, t->cosines, t->sines, 1, a->n_heads, a->head_dim, t->half);
        fl_op_rope(e, t->k, t->cosines, t->sines, 1, a->n_kv_heads, a->head_dim, t->half);
    }
    keep(a, t->k, t->keys);
    keep(a, t->v, t->values);
    fl_op_attention(e, a);
}

/* decided[id] of every item, out of its dot. */
static fl_kernel_status decide(const fl_engine *e, const fl_decided *d)
{
    const fl_items *items = d->items;
    float *dots = d->neurons.pre;
    const fl_kernel_status status = fl_op_dot(e, d->neurons.acts, d->deciding, items, dots, 0);

    if (status != FL_KERNEL_OK) return status;
    for (int64_t k = 0; k < items->n; k++) {
        const int32_t id = items->ids[k];
        d->decided[id] = d->bias ? dots[k] + d->bias[id] : dots[k];
    }
    return FL_KERNEL_OK;
}

fl_kernel_status fl_op_decided(const fl_engine *e, const fl_decided *d, int64_t *n_added)
{
    const fl_items *items = d->items;
    fl_kernel_status status = fl_ascending(items);
    int64_t n = 0;

    *n_added = 0;
    if (status != FL_KERNEL_OK) return status;
    if (items->n && (items->ids[0] < 0 || items->ids[items->n - 1] >= d->n_decided))
        return FL_OUT_OF_RANGE;
    if (d->deciding && (status = decide(e, d)) != FL_KERNEL_OK) return status;
    for (int64_t k = 0; k < items->n; k++) {
        const int32_t id = items->ids[k];
        if (d->deciding && !(d->decided[id] > 0)) continue;
        d->active[n] = id;
        d->neurons.pre[n++] = d->decided[id];
    }
    const fl_items active = {items->addresses, items->n_frames, d->active, 0, n};
    fl_neurons neurons = d->neurons;
    neurons.first = NULL, neurons.items = &active;
    *n_added = n;
    return n ? fl_op_neurons(e, &neurons) : FL_KERNEL_OK;
}
