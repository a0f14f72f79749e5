/* Items of a sparse plane brought in parts: those in memory first, the others as their frames arrive.
 *
 * What offload/pick.py does between a request and its end, without the interpreter: reads are submitted
 * in waves, two at a time, each with a half of an area for frames that have no slot; what has arrived
 * appears in the plane's address table, what has only been lent disappears when the next part is asked
 * for.  Items come in ascending order.  Knows no policy and no pins: who took the slots ends them. */
#ifndef FL_BRING_H
#define FL_BRING_H

#include <stddef.h>
#include <stdint.h>

#include "fl_frames.h"
#include "fl_reader.h"

typedef struct {
    fl_ticket *ticket; /* NULL: none */
    size_t start, stop; /* extents */
    size_t step;        /* extents between two parts */
    size_t done;        /* of them, parts given */
} fl_wave;

typedef struct {
    const fl_frames *tables;
    fl_reader *reader;
    uint64_t *addresses;       /* per frame of the plane: where it can be read, 0 = nowhere */
    const int32_t *frame_slot; /* -1: its address is only lent */
    const int32_t *ids;        /* what is asked for, ascending, per_frame items to a frame */
    size_t n_ids;
    int64_t per_frame;
    /* Extents of the frames that are missing, as fl_frames_coalesce makes them, and their targets. */
    const int32_t *first, *missing;
    const int64_t *offset, *length;
    uint64_t *targets;
    size_t n_extents;
    uint64_t halves[2], half_bytes, step, trash; /* the area; places in it are `step` bytes each */

    /* What next() answers: ids [from, stop) can be used until it is called again. */
    size_t from, stop;
    int64_t wait_ns, n_bytes; /* stood still for reads; submitted */
    size_t n_submitted;       /* extents */

    fl_wave waves[2];
    size_t wave;         /* which is being given, from 0 */
    size_t shown, given; /* missing frames [shown, given) have appeared with the last part */
    int begun;
} fl_bring;

/* FL_READ_OK, or as fl_reader_submit, nothing being under way then; FL_REFUSED with kind 0: the arrays
 * do not fit each other, or a frame said to be missing is there. */
int fl_bring_start(fl_bring *b, fl_failure *failure);

/* FL_READ_OK, and nothing is left when from == n_ids; or as fl_ticket_wait and fl_reader_submit, with
 * failure->extent counted from the first of all. */
int fl_bring_next(fl_bring *b, int64_t slice_ns, fl_failure *failure);

/* Waits for reads that are under way; lent addresses disappear.  Idempotent. */
void fl_bring_end(fl_bring *b);

#endif
