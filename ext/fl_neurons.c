/* Neurons of one token in one walk over memory: dots, activation and down-sum, tile by tile.
 *
 * A bundle lies in memory as gate | up | down.  Dots over all of them and then sums over all of them
 * skip through the same memory twice, and no prefetcher follows a stream with holes (measured, two
 * threads, 2.7 KiB rows: 12 GB/s).  Here each thread walks its bundles of a tile, the whole bundle
 * AHEAD of it asked for, and the tile's sums find their pieces in the cache (17 GB/s).  Every number
 * is the one that fl_op_dot, fl_op_activate and fl_op_accumulate make: dots and activations do not
 * depend on their neighbours, and tiles ascend. */
#include <stdatomic.h>

#include "fl_parts.h"

/* What the second-level caches hold between a tile's dots and its sums; 512 KiB and 2 MiB served as
 * well, 256 KiB a quarter worse: two wake-ups a tile. */
enum { TILE_BYTES = 1 << 20 };
enum { AHEAD = 2 }; /* bundles; one or three, or a bundle's down piece alone, are slower */
enum { LINE = 64 };

typedef struct {
    const fl_engine *e;
    const fl_neurons *n;
    int64_t k, count; /* this tile */
    int parts;
    _Atomic int status;
} neurons_job;

static void ask_for(const uint8_t *row, int64_t n_bytes)
{
    for (int64_t at = 0; at < n_bytes; at += LINE) __builtin_prefetch(row + at, 0, 2);
}

/* The dots of item k of the list; `ahead` is an item to ask for, or k where there is none. */
static fl_kernel_status dots(const neurons_job *j, int64_t k, int64_t ahead)
{
    const fl_neurons *a = j->n;
    const fl_piece *pieces[2] = {a->first, a->second};
    float *outs[2] = {a->pre, a->up}, sums[2];
    const uint8_t *rows[2], *down;
    size_t n = 0;
    fl_kernel_status status = fl_resolve(a->down, a->items, ahead, 1, &down);

    if (status != FL_KERNEL_OK) return status;
    if (ahead != k) ask_for(down - a->down->offset, a->bundle_bytes);
    for (int i = 0; i < 2; i++)
        if (pieces[i]) {
            status = fl_resolve(pieces[i], a->items, k, 1, rows + n++);
            if (status != FL_KERNEL_OK) return status;
        }
    if (n == 0) return FL_KERNEL_OK;
    const fl_piece *either = a->first ? a->first : a->second;
    j->e->set->dot[either->weight_type](a->acts, rows, n, sums, 2);
    n = 0;
    for (int i = 0; i < 2; i++)
        if (pieces[i]) outs[i][k] = sums[n++];
    return FL_KERNEL_OK;
}

static void dots_part(void *context, int part)
{
    neurons_job *j = context;
    const fl_neurons *a = j->n;
    const int64_t from = j->k + cut(j->count, part, j->parts);
    const int64_t to = j->k + cut(j->count, part + 1, j->parts);

    for (int64_t k = from; k < to; k++) {
        const fl_kernel_status status = dots(j, k, k + AHEAD < to ? k + AHEAD : k);
        if (status != FL_KERNEL_OK) {
            atomic_store(&j->status, status);
            return;
        }
    }
    j->e->set->activate(a->kind, a->pre + from, a->second ? a->up + from : NULL,
                        (size_t)(to - from), a->pre + from);
}

fl_kernel_status fl_op_neurons(const fl_engine *e, const fl_neurons *a)
{
    const int64_t tile = larger(1, TILE_BYTES / larger(1, a->bundle_bytes));
    neurons_job j = {e, a, 0, 0, 1, FL_KERNEL_OK};

    if (fl_ascending(a->items) != FL_KERNEL_OK) return FL_NOT_ASCENDING;
    for (int64_t k = 0; k < a->items->n; k += tile) {
        j.k = k, j.count = smaller(tile, a->items->n - k);
        j.parts = parts_for(e, j.count, 2 * a->acts->n_cols, 1);
        fl_pool_run(e->pool, dots_part, &j, j.parts);
        fl_items some = *a->items;
        if (some.ids) some.ids += k;
        else some.start += k;
        some.n = j.count;
        fl_kernel_status status = (fl_kernel_status)atomic_load(&j.status);
        if (status == FL_KERNEL_OK)
            status = fl_op_accumulate(e, a->pre + k, 0, 1, a->down, &some, a->y, 0);
        if (status != FL_KERNEL_OK) return status;
    }
    return FL_KERNEL_OK;
}
