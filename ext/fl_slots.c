/* See fl_slots.h.  Held to offload/taking.py, the same in NumPy. */
#include "fl_slots.h"

/* ------------------------------------------------------------------------------------ selection */

/* What items are chosen by: the heat of slots, or of positions in t->missing how long ago. */
typedef struct {
    const double *heat;
    const int32_t *last_use, *frames;
} keys;

/* Whether `a` is to be chosen after `b`: by key, then by number. */
static int after(const keys *by, int32_t a, int32_t b)
{
    if (by->heat) {
        if (by->heat[a] != by->heat[b]) return by->heat[a] > by->heat[b];
    } else {
        const int32_t x = by->last_use[by->frames[a]], y = by->last_use[by->frames[b]];
        if (x != y) return x < y;
    }
    return a > b;
}

static void sink(const keys *by, int32_t *heap, size_t n, size_t i)
{
    const int32_t item = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && after(by, heap[child + 1], heap[child])) child++;
        if (!after(by, heap[child], item)) break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

/* The k first of n items, in no order, to the front: a heap whose top is the last of them. */
static void choose(const keys *by, int32_t *items, size_t n, size_t k)
{
    if (k == 0 || k >= n) return;
    for (size_t i = k / 2; i-- > 0;) sink(by, items, k, i);
    for (size_t i = k; i < n; i++) {
        if (!after(by, items[0], items[i])) continue;
        const int32_t item = items[i];
        items[i] = items[0];
        items[0] = item;
        sink(by, items, k, 0);
    }
}

/* ----------------------------------------------------------------------------------------- take */

/* Empty the coldest slots that are not pinned until so many are free, or as many as can be. */
static void make_room(const fl_slots *s, fl_take *t)
{
    const size_t n_free = t->n_slots - t->n_used;
    const keys by = {s->heat, NULL, NULL};
    int32_t *open = t->scratch;
    size_t n_open = 0, n;

    if (t->n_missing <= n_free) return;
    for (size_t slot = 0; slot < t->n_slots; slot++)
        if (s->pins[slot] == 0 && s->slot_frame[slot] >= 0) open[n_open++] = (int32_t)slot;
    n = t->n_missing - n_free < n_open ? t->n_missing - n_free : n_open;
    choose(&by, open, n_open, n);
    for (size_t i = 0; i < n; i++) {
        const int32_t slot = open[i], frame = s->slot_frame[slot];
        if (s->prefetched[slot]) t->unused[t->n_unused++] = frame;
        s->prefetched[slot] = 0;
        s->addresses[frame] = 0;
        s->frame_slot[frame] = -1;
        s->slot_frame[slot] = -1;
    }
    t->n_evicted = n;
    t->n_used -= n;
}

/* The lowest free slots for what is missing, and where they do not suffice for what was used last. */
static void place(const fl_slots *s, fl_take *t)
{
    const size_t n_free = t->n_slots - t->n_used;
    const size_t n = t->n_missing < n_free ? t->n_missing : n_free;
    const keys by = {NULL, s->last_use, t->missing};
    size_t slot = 0;

    for (size_t i = 0; i < t->n_missing; i++) t->scratch[i] = (int32_t)i;
    choose(&by, t->scratch, t->n_missing, n);
    for (size_t i = 0; i < t->n_missing; i++) t->targets[i] = 0;
    for (size_t i = 0; i < n; i++) t->targets[t->scratch[i]] = 1;
    t->n_placed = 0;
    for (size_t i = 0; i < t->n_missing; i++) {
        if (t->targets[i] == 0) continue;
        while (s->slot_frame[slot] >= 0) slot++;
        s->slot_frame[slot] = t->missing[i];
        s->frame_slot[t->missing[i]] = (int32_t)slot;
        s->pins[slot] = 1;
        s->heat[slot] = t->worth;
        t->targets[i] = s->slot_address[slot];
        t->placed[t->n_placed++] = (int32_t)slot;
    }
    t->n_used += n;
}

int fl_slots_take(const fl_slots *s, fl_take *t)
{
    for (size_t i = 0; i < t->n; i++) {
        const int32_t frame = t->frames[i];
        if (frame < 0 || (size_t)frame >= s->n_frames || (i > 0 && frame <= t->frames[i - 1]))
            return FL_NOT_ROWS;
        if (s->frame_slot[frame] >= 0 && s->addresses[frame] == 0) return FL_LOADING;
    }
    t->n_hits = t->n_missing = 0;
    for (size_t i = 0; i < t->n; i++) {
        const int32_t frame = t->frames[i], slot = s->frame_slot[frame];
        if (slot < 0) {
            t->missing[t->n_missing++] = frame;
            continue;
        }
        t->hits[t->n_hits++] = slot;
        s->pins[slot]++;
        s->prefetched[slot] = 0;
        if (t->admit) s->heat[slot] += t->worth;
    }
    t->n_evicted = t->n_unused = 0;
    if (t->admit) make_room(s, t);
    place(s, t);
    for (size_t i = 0; t->admit && i < t->n; i++) s->last_use[t->frames[i]] = t->clock;
    return 0;
}

int fl_slots_end(const fl_slots *s, const int32_t *hits, size_t n_hits, const int32_t *placed,
                 size_t n_placed)
{
    for (size_t i = 0; i < n_hits + n_placed; i++) {
        const int32_t slot = i < n_hits ? hits[i] : placed[i - n_hits];
        if (slot < 0 || (size_t)slot >= s->n_most || s->pins[slot] <= 0) return 1;
        if (i >= n_hits && (s->slot_frame[slot] < 0 || s->addresses[s->slot_frame[slot]] == 0))
            return 1;
    }
    for (size_t i = 0; i < n_hits; i++) s->pins[hits[i]]--;
    for (size_t i = 0; i < n_placed; i++) s->pins[placed[i]]--;
    return 0;
}
