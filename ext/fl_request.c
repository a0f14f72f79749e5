/* See fl_request.h.  Held to offload/taking.py and planner.coalesce, the same in NumPy. */
#include "fl_request.h"

#include <stdlib.h>

/* The distinct frames of the items, and how much of them is missing, before that is changed. */
static int find_frames(const fl_slots *s, const fl_frames *t, fl_request *r, int32_t *frames)
{
    const int64_t n_frames = (int64_t)(s->n_frames < t->n_frames ? s->n_frames : t->n_frames);
    size_t n = 0;

    r->n_absent = 0;
    r->absent_bytes = 0;
    for (size_t i = 0; i < r->n_ids; i++) {
        if (r->ids[i] < 0 || (i > 0 && r->ids[i] <= r->ids[i - 1])) return FL_NOT_ROWS;
        const int32_t frame = (int32_t)(r->ids[i] / r->per_frame);
        if (frame >= n_frames) return FL_NOT_ROWS;
        if (n == 0 || frames[n - 1] != frame) frames[n++] = frame;
        if (s->frame_slot[frame] >= 0) continue;
        r->n_absent++;
        r->absent_bytes += fl_frames_bytes(t, &frame, 1);
    }
    r->absent_bytes /= r->per_frame;
    r->take.frames = frames;
    r->take.n = n;
    return 0;
}

int fl_request_make(const fl_slots *s, const fl_frames *t, fl_request *r)
{
    const size_t n = r->n_ids, most = n > s->n_most ? n : s->n_most;
    /* 8 bytes: targets, offsets, lengths; 4 bytes: frames, the four answers, where extents start,
     * and what taking works in. */
    const size_t wide = 3 * n, narrow = 6 * n + 1 + most;
    uint64_t *memory = r->per_frame < 1 ? NULL : malloc(wide * sizeof *memory + narrow * sizeof(int32_t));
    fl_take *take = &r->take;
    int status = FL_NOT_ROWS;

    r->memory = NULL;
    if (!memory) return r->per_frame < 1 ? FL_NOT_ROWS : FL_NO_MEMORY;
    int32_t *frames = (int32_t *)(memory + wide);
    take->targets = memory;
    r->offset = (int64_t *)(memory + n);
    r->length = (int64_t *)(memory + 2 * n);
    take->hits = frames + n;
    take->missing = frames + 2 * n;
    take->placed = frames + 3 * n;
    take->unused = frames + 4 * n;
    r->first = frames + 5 * n;
    take->scratch = frames + 6 * n + 1;
    status = find_frames(s, t, r, frames);
    if (status == 0) status = fl_slots_take(s, take);
    if (status != 0) {
        free(memory);
        return status;
    }
    r->unused_bytes = fl_frames_bytes(t, take->unused, take->n_unused);
    r->n_extents = (size_t)fl_frames_coalesce(t, take->missing, take->n_missing, r->max_gap,
                                              r->max_extent, r->max_frames, r->first, r->offset,
                                              r->length);
    r->memory = memory;
    return 0;
}

int fl_request_end(const fl_slots *s, fl_request *r)
{
    const fl_take *take = &r->take;

    if (!r->memory || !take->n) return 0;
    if (fl_slots_end(s, take->hits, take->n_hits, take->placed, take->n_placed)) return 1;
    r->take.n = 0; /* what was taken is given back once */
    return 0;
}

void fl_request_free(fl_request *r)
{
    free(r->memory);
    r->memory = NULL;
}
