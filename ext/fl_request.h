/* A request for items of a sparse plane: what of it is there, what has to give way, which reads bring
 * the rest.
 *
 * fl_slots_take of the frames of the items and fl_frames_coalesce of what is missing, in one allocation.
 * Nothing here reads or waits. */
#ifndef FL_REQUEST_H
#define FL_REQUEST_H

#include "fl_frames.h"
#include "fl_slots.h"

typedef struct {
    /* Asked for: items, ascending, per_frame of them to a frame; extents as fl_frames_coalesce has
     * them; of `take` n_slots, n_used, worth, clock and admit. */
    const int32_t *ids;
    size_t n_ids;
    int64_t per_frame, max_gap, max_extent, max_frames;
    fl_take take; /* and its answer */

    size_t n_absent;      /* items in frames that are missing */
    int64_t absent_bytes; /* theirs, of the file */
    int64_t unused_bytes; /* of victims that were prefetched and never used */
    int32_t *first;       /* the extents that bring take.missing */
    int64_t *offset, *length;
    size_t n_extents;
    void *memory; /* all of the above; NULL: made of nothing, or ended */
} fl_request;

enum { FL_NO_MEMORY = 3 };

/* 0, or as fl_slots_take, or FL_NO_MEMORY; then nothing has changed. */
int fl_request_make(const fl_slots *s, const fl_frames *t, fl_request *r);

/* 0, and each slot has a pin less; 1, and nothing has changed, as fl_slots_end.  Idempotent. */
int fl_request_end(const fl_slots *s, fl_request *r);

void fl_request_free(fl_request *r);

#endif
