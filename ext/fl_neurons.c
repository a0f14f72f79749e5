/* Neurons of one token in one walk over memory: dots, activation and down-sum, group by group.
 *
 * A bundle lies in memory as gate | up | down.  Dots over all of them and then sums over all of them
 * skip through the same memory twice, and no prefetcher follows a stream with holes.  Here a thread
 * takes a group of neurons, walks their bundles from one end to the other - dots, and a look at each
 * line of the down piece, so that the processor sees one stream -, and adds the down pieces out of
 * its own cache when the groups before have been added.  Until it is a group's turn, its thread goes
 * on with others.  Measured on bundles of 8 KiB, two threads: 26 GB/s, where asking for lines ahead
 * gives 20, all threads on each tile's columns 15 to 20, and the operators one after the other 12.
 *
 * Every number is the one that fl_op_dot, fl_op_activate and fl_op_accumulate make: dots and
 * activations do not depend on their neighbours, and groups are added in ascending order. */
#include <sched.h>
#include <stdatomic.h>

#include "fl_parts.h"

enum { GROUP_BYTES = 1 << 17 }; /* of whole bundles; 64 KiB to 512 KiB differ little */
enum { WAITING = 4 };           /* groups a thread may have made and not added: they stay cached */
enum { ROWS = 8 };              /* neurons whose down pieces are added at once */
enum { AHEAD = 2 };             /* scattered bundles are asked for so many before they are used */
enum { LINE = 64 };
/* Additions follow each other: from so many threads on they would be what all wait for. */
enum { MOST_THREADS = 6 };
/* Polls before the processor is offered to others: the thread waited for may need this one. */
enum { SPINS = 2000 };

typedef struct {
    const fl_engine *e;
    const fl_neurons *n;
    int64_t group, n_groups;    /* neurons of a group; groups */
    _Atomic int64_t next, turn; /* the group that is taken next, and that is added next */
    _Atomic int status;
} neurons_job;

static int64_t row_bytes(const fl_piece *piece)
{
    static const int64_t OF_GROUP[FL_N_WEIGHT_TYPES] = {128, 64, 64, 34, 18};
    return (piece->n_cols + FL_GROUP - 1) / FL_GROUP * OF_GROUP[piece->weight_type];
}

/* Ask for the bundle of item k + AHEAD, unless it follows in memory: then the processor does. */
static fl_kernel_status ask_ahead(const fl_neurons *a, int64_t k, int64_t stop, const uint8_t *down)
{
    const uint8_t *ahead;

    if (k + AHEAD >= stop) return FL_KERNEL_OK;
    fl_kernel_status status = fl_resolve(a->down, a->items, k + AHEAD, 1, &ahead);
    if (status == FL_KERNEL_OK && ahead != down + AHEAD * a->down->stride)
        for (int64_t at = 0; at < a->down->stride; at += LINE)
            __builtin_prefetch(ahead - a->down->offset + at, 0, 2);
    return status;
}

static void look_at(const uint8_t *row, int64_t n_bytes)
{
    for (int64_t at = 0; at < n_bytes; at += LINE) (void)*(const volatile uint8_t *)(row + at);
}

/* pre and up of item k of the list, whose group ends before `stop`. */
static fl_kernel_status dots(const neurons_job *j, int64_t k, int64_t stop)
{
    const fl_neurons *a = j->n;
    const fl_piece *pieces[2] = {a->first, a->second};
    const fl_piece *either = a->first ? a->first : a->second;
    float *outs[2] = {a->pre, a->up}, sums[2];
    const uint8_t *rows[2], *down;
    size_t n = 0;
    fl_kernel_status status = fl_resolve(a->down, a->items, k, 1, &down);

    if (status == FL_KERNEL_OK) status = ask_ahead(a, k, stop, down);
    for (int i = 0; i < 2 && status == FL_KERNEL_OK; i++)
        if (pieces[i]) status = fl_resolve(pieces[i], a->items, k, 1, rows + n++);
    if (status != FL_KERNEL_OK) return status;
    j->e->set->dot[either->weight_type](a->acts, rows, n, sums, 2);
    n = 0;
    for (int i = 0; i < 2; i++)
        if (pieces[i]) outs[i][k] = sums[n++];
    look_at(down, row_bytes(a->down));
    return FL_KERNEL_OK;
}

static fl_kernel_status make(const neurons_job *j, int64_t group)
{
    const fl_neurons *a = j->n;
    const int64_t from = group * j->group, stop = smaller(from + j->group, a->items->n);

    for (int64_t k = from; k < stop; k++) {
        const fl_kernel_status status = dots(j, k, stop);
        if (status != FL_KERNEL_OK) return status;
    }
    j->e->set->activate(a->kind, a->pre + from, a->second ? a->up + from : NULL,
                        (size_t)(stop - from), a->pre + from);
    return FL_KERNEL_OK;
}

static fl_kernel_status add(const neurons_job *j, int64_t group)
{
    const fl_neurons *a = j->n;
    const int64_t from = group * j->group, stop = smaller(from + j->group, a->items->n);
    const size_t n_cols = (size_t)a->down->n_cols;
    const uint8_t *rows[ROWS];

    for (int64_t k = from; k < stop; k += ROWS) {
        const int64_t n = smaller(ROWS, stop - k);
        const fl_kernel_status status = fl_resolve(a->down, a->items, k, n, rows);
        if (status != FL_KERNEL_OK) return status;
        j->e->set->accumulate[a->down->weight_type](a->pre + k, 0, 1, rows, (size_t)n, n_cols, 0,
                                                    n_cols, a->y, 0);
    }
    return FL_KERNEL_OK;
}

/* Until no group is left: take one and make it; add those made whose turn it is. */
static void walk(void *context, int part)
{
    neurons_job *j = context;
    int64_t made[WAITING], n_made = 0, group = 0;
    int spin = 0;

    (void)part; /* which groups a thread gets is left open */
    while (group < j->n_groups || n_made) {
        fl_kernel_status status = FL_KERNEL_OK;
        if (n_made && atomic_load_explicit(&j->turn, memory_order_acquire) == made[0]) {
            /* After a failure groups still take turns, and do nothing else. */
            if (atomic_load(&j->status) == FL_KERNEL_OK) status = add(j, made[0]);
            atomic_store_explicit(&j->turn, made[0] + 1, memory_order_release);
            n_made--, spin = 0;
            for (int i = 0; i < n_made; i++) made[i] = made[i + 1];
        } else if (n_made < WAITING && group < j->n_groups) {
            group = atomic_fetch_add(&j->next, 1);
            if (group >= j->n_groups) continue;
            if (atomic_load(&j->status) == FL_KERNEL_OK) status = make(j, group);
            made[n_made++] = group;
        } else if (++spin < SPINS)
            fl_relax();
        else
            sched_yield();
        if (status != FL_KERNEL_OK) atomic_store(&j->status, status);
    }
}

/* One operator after the other. */
static fl_kernel_status in_a_row(const fl_engine *e, const fl_neurons *a)
{
    const fl_piece *pieces[2] = {a->first, a->second};
    float *outs[2] = {a->pre, a->up};

    for (int i = 0; i < 2; i++) {
        if (!pieces[i]) continue;
        const fl_kernel_status status = fl_op_dot(e, a->acts, pieces[i], a->items, outs[i], 0);
        if (status != FL_KERNEL_OK) return status;
    }
    fl_op_activate(e, a->kind, a->pre, a->second ? a->up : NULL, a->items->n, a->pre);
    return fl_op_accumulate(e, a->pre, 0, 1, a->down, a->items, a->y, 0);
}

fl_kernel_status fl_op_neurons(const fl_engine *e, const fl_neurons *a)
{
    const int64_t group = larger(1, GROUP_BYTES / a->down->stride);
    neurons_job j = {e, a, group, (a->items->n + group - 1) / group, 0, 0, FL_KERNEL_OK};
    const int parts = parts_for(e, j.n_groups, group * 3 * a->down->n_cols, 1);

    if (parts > MOST_THREADS || (!a->first && !a->second)) return in_a_row(e, a);
    if (fl_ascending(a->items) != FL_KERNEL_OK) return FL_NOT_ASCENDING;
    fl_pool_run(e->pool, walk, &j, parts);
    return (fl_kernel_status)atomic_load(&j.status);
}
