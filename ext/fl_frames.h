/* Frames of a plane as its tables have them: which reads bring them, and a batch out of those.
 *
 * Knows offsets and lengths; no file, no thread.  What comes in is not trusted: frames that are no
 * rows of the tables, or do not ascend, are refused, and sums wrap instead of overflowing. */
#ifndef FL_FRAMES_H
#define FL_FRAMES_H

#include <stddef.h>
#include <stdint.h>

#include "fl_reader.h"

/* Frame i lies at offsets[i] and is stored[i] bytes long, in the file padded to `alignment`; its check
 * is XXH64 seeded with offsets[i] + file_id. */
typedef struct {
    size_t n_frames;
    const uint64_t *offsets;
    const uint32_t *stored;
    const uint64_t *digests;
    uint64_t file_id;
    int64_t alignment;
} fl_frames;

/* Extents that hold these n frames, ascending: extent e holds first[e] to first[e + 1], and is
 * length[e] bytes at offset[e].  A frame joins the extent before it when at most max_gap bytes lie
 * between and it then has no more than max_extent bytes and max_frames frames.  `first` has room for
 * n + 1, the others for n.  The number of extents; -1: the frames are refused. */
int64_t fl_frames_coalesce(const fl_frames *t, const int32_t *frames, size_t n, int64_t max_gap,
                           int64_t max_extent, int64_t max_frames, int32_t *first,
                           int64_t *offset, int64_t *length);

/* Their bytes in the file, padding included; -1: the frames are refused.  They may repeat. */
int64_t fl_frames_bytes(const fl_frames *t, const int32_t *frames, size_t n);

/* n extents as above: frame first[e] + k goes to targets[first[e] + k], gaps to `trash`.  A target of
 * 0 is filled in: the places from `room` to `room_end`, `step` bytes each. */
typedef struct {
    size_t n;
    const int32_t *first, *frames;
    const int64_t *offset, *length;
    uint64_t *targets;
    uint64_t room, room_end, step, trash;
} fl_scatter;

/* Into *batch, in one allocation which is returned and to be freed.  NULL without memory, or with
 * *refused set. */
enum { FL_NO_FRAMES = 1, FL_NO_ROOM = 2 };
void *fl_frames_scatter(const fl_frames *t, const fl_scatter *s, fl_batch *batch, int *refused);

#endif
