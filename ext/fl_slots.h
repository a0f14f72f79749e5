/* A plane's slots and what lies in them, and what a request for frames does to that.
 *
 * Tables as cache/segment.py describes them, and of the least frequently used policy the heat of each
 * slot.  Nothing here reads or waits.  What comes in is not trusted: frames that are no rows of the
 * tables, or do not ascend, are refused before anything has changed. */
#ifndef FL_SLOTS_H
#define FL_SLOTS_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    size_t n_frames, n_most; /* rows of the tables per frame and per slot */
    int32_t *frame_slot, *last_use;
    uint64_t *addresses;
    int32_t *slot_frame;
    const uint64_t *slot_address;
    int16_t *pins;
    uint8_t *prefetched;
    double *heat;
} fl_slots;

/* `n` frames are asked for at `clock`, when a use is worth `worth`; slots from n_slots on are not in use,
 * n_used of the others hold a frame.  With `admit` victims make room, and what was asked for is
 * remembered. */
typedef struct {
    const int32_t *frames;
    size_t n, n_slots, n_used;
    double worth;
    int32_t clock;
    int admit;
    /* The answer, room for n each: slots of what is there, pinned; frames that are not; the slots of
     * those of them that have one now, pinned; where each is to be read, 0 = it has none; victims that
     * were prefetched and never used. */
    int32_t *hits, *missing, *placed, *unused;
    uint64_t *targets;
    size_t n_hits, n_missing, n_placed, n_unused, n_evicted;
    int32_t *scratch; /* max(n, n_most) */
} fl_take;

enum { FL_NOT_ROWS = 1, FL_LOADING = 2 };

/* 0, or why not. */
int fl_slots_take(const fl_slots *s, fl_take *t);

/* A request is over: one pin less on each of the slots.  0; or 1, and nothing has changed, where one
 * of them has no pin or a frame of `placed` has not arrived. */
int fl_slots_end(const fl_slots *s, const int32_t *hits, size_t n_hits, const int32_t *placed,
                 size_t n_placed);

#endif
