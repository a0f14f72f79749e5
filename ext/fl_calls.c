/* See fl_calls.h. */
#include "fl_calls.h"

#include <string.h>

static fl_kernel_status neurons(const fl_engine *e, const fl_neurons_call *c)
{
    const fl_neurons n = {&c->acts, c->has_first ? &c->first : NULL,
                          c->has_second ? &c->second : NULL, &c->down, &c->items, c->kind,
                          c->pre, c->up, c->y};
    return fl_op_neurons(e, &n);
}

static fl_kernel_status decided(const fl_engine *e, const fl_decided_call *c)
{
    fl_items items = c->items;
    const fl_decided d = {{&c->acts, NULL, c->has_second ? &c->second : NULL, &c->down, NULL, c->kind,
                           c->pre, c->up, c->y},
                          &items, c->has_deciding ? &c->deciding : NULL, c->bias, c->decided,
                          c->n_decided, c->active};

    if (*c->count < 0 || *c->count > items.n) return FL_OUT_OF_RANGE;
    items.n = *c->count;
    return fl_op_decided(e, &d, c->added);
}

static fl_kernel_status attend(const fl_engine *e, const fl_attend_call *c, int64_t position)
{
    fl_token t = c->token;

    if (position >= 0) t.attention.first_position = position;
    if (t.attention.first_position >= c->n_positions) return FL_NO_POSITION;
    if (t.half) {
        t.cosines += t.attention.first_position * t.half;
        t.sines += t.attention.first_position * t.half;
    }
    fl_op_attend_token(e, &t);
    return FL_KERNEL_OK;
}

fl_kernel_status fl_make_call(const fl_engine *e, const fl_call *call, int64_t position)
{
    const fl_linear_call *l = &call->linear;
    const fl_activate_call *t = &call->activate;
    const fl_accumulate_call *a = &call->sums;
    const fl_low_bit_call *b = &call->bits;
    const fl_above_call *o = &call->above;
    const fl_norm_call *n = &call->norm;
    const fl_vector_call *v = &call->vector;

    switch (call->kind) {
    case FL_CALL_PREPARE:
        fl_op_prepare(e, l->acts.x, l->acts.n_tokens, l->acts.n_cols, l->q, l->acts.q_stride,
                      l->scales, l->acts.scale_stride, l->acts.tiles);
        break;
    case FL_CALL_LINEAR:
        return fl_op_linear(e, &l->acts, l->prepares ? l->q : NULL, l->scales, &l->piece, &l->items,
                            l->out, l->out_stride);
    case FL_CALL_NEURONS:
        return neurons(e, &call->neurons);
    case FL_CALL_ACTIVATE:
        fl_op_activate(e, t->kind, t->pre, t->up, t->n, t->out);
        break;
    case FL_CALL_ACCUMULATE:
        return fl_op_accumulate(e, a->coef, a->coef_stride, a->n_tokens, &a->piece, &a->items, a->y,
                                a->y_stride);
    case FL_CALL_LOW_BIT:
        fl_op_low_bit(e, &b->acts, b->rows, b->n_rows, b->n_planes, b->out);
        break;
    case FL_CALL_ABOVE:
        *o->count = fl_op_active_ids(o->values, o->cut, 1, o->n, o->ids);
        break;
    case FL_CALL_DECIDED:
        return decided(e, &call->decided);
    case FL_CALL_RMS_NORM:
        fl_op_rms_norm(e, n->x, n->weight, n->n_rows, n->n, n->eps, n->out);
        break;
    case FL_CALL_LAYER_NORM:
        fl_op_layer_norm(e, n->x, n->weight, n->bias, n->n_rows, n->n, n->eps, n->out);
        break;
    case FL_CALL_ADD_RMS_NORM:
        fl_op_add_rms_norm(e, n->x, n->added, n->weight, n->n_rows, n->n, n->eps, n->out);
        break;
    case FL_CALL_ATTEND_TOKEN:
        return attend(e, &call->attend, position);
    case FL_CALL_CLEAR:
        memset(v->x, 0, (size_t)v->n * sizeof *v->x);
        break;
    case FL_CALL_ADD:
        for (int64_t i = 0; i < v->n; i++) v->x[i] += v->added[i];
        break;
    case FL_CALL_SCALE:
        for (int64_t i = 0; i < v->n; i++) v->x[i] *= v->factor;
        break;
    }
    return FL_KERNEL_OK;
}
