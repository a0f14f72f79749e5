/* See fl_frames.h.  Held to planner.coalesce and ReadBatch.scattered, the same in NumPy. */
#include "fl_frames.h"

#include <stdlib.h>

static uint64_t padded(const fl_frames *t, int32_t frame)
{
    const uint64_t a = (uint64_t)t->alignment;

    return (t->stored[frame] + a - 1) / a * a;
}

static int is_row(const fl_frames *t, int32_t frame)
{
    return frame >= 0 && (size_t)frame < t->n_frames;
}

int64_t fl_frames_coalesce(const fl_frames *t, const int32_t *frames, size_t n, int64_t max_gap,
                           int64_t max_extent, int64_t max_frames, int32_t *first,
                           int64_t *offset, int64_t *length)
{
    uint64_t end = 0, begin = 0;
    int64_t e = 0;

    first[0] = 0;
    for (size_t i = 0; i < n; i++) {
        if (!is_row(t, frames[i]) || (i > 0 && frames[i] <= frames[i - 1]))
            return -1;
        const uint64_t at = t->offsets[frames[i]], stop = at + padded(t, frames[i]);
        if (i > 0 && ((int64_t)(at - end) > max_gap || (int64_t)(stop - begin) > max_extent ||
                      (int64_t)i - first[e] >= max_frames))
            first[++e] = (int32_t)i;
        if ((size_t)first[e] == i) {
            begin = at;
            offset[e] = (int64_t)at;
        }
        end = stop;
        length[e] = (int64_t)(end - begin);
    }
    if (n == 0)
        return 0;
    first[++e] = (int32_t)n;
    return e;
}

int64_t fl_frames_bytes(const fl_frames *t, const int32_t *frames, size_t n)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < n; i++) {
        if (!is_row(t, frames[i]))
            return -1;
        sum += padded(t, frames[i]);
    }
    return (int64_t)(sum & INT64_MAX);
}

/* One more destination of the extent that began with destination `start`: a piece that goes on where
 * the one before ended is the same piece (frames in neighbouring slots). */
static int32_t add_piece(uint64_t *address, int64_t *length, int32_t start, int32_t n,
                         uint64_t at, int64_t n_bytes)
{
    if (n_bytes <= 0)
        return n;
    if (n > start && address[n - 1] + (uint64_t)length[n - 1] == at) {
        length[n - 1] += n_bytes;
        return n;
    }
    address[n] = at;
    length[n] = n_bytes;
    return n + 1;
}

void *fl_frames_scatter(const fl_frames *t, const fl_scatter *s, fl_batch *batch, int *refused)
{
    const size_t base = (size_t)s->first[0], m = (size_t)s->first[s->n] - base;
    /* 8 bytes: address and length of up to 2 pieces a frame, length, seed and digest of a check;
     * 4 bytes: where an extent's pieces and checks start. */
    const size_t wide = 7 * m, narrow = 2 * (s->n + 1);
    uint64_t *memory = malloc(wide * sizeof(uint64_t) + narrow * sizeof(int32_t));
    uint64_t room = s->room;
    int32_t n_pieces = 0;

    *refused = 0;
    if (!memory)
        return NULL;
    uint64_t *address = memory, *seed = memory + 4 * m, *digest = memory + 5 * m;
    int64_t *length = (int64_t *)(memory + 2 * m), *check_length = (int64_t *)(memory + 6 * m);
    int32_t *piece_start = (int32_t *)(memory + wide), *check_start = piece_start + s->n + 1;

    for (size_t e = 0; e < s->n; e++) {
        const int32_t start = n_pieces, stop = s->first[e + 1];

        piece_start[e] = start;
        check_start[e] = s->first[e] - (int32_t)base;
        for (int32_t i = s->first[e]; i < stop; i++) {
            const int32_t frame = s->frames[i];
            if (!is_row(t, frame) || (i + 1 < stop && !is_row(t, s->frames[i + 1])))
                *refused = FL_NO_FRAMES;
            else if (s->targets[i] == 0 && (room > s->room_end || s->step > s->room_end - room))
                *refused = FL_NO_ROOM;
            if (*refused) {
                free(memory);
                return NULL;
            }
            const size_t k = (size_t)i - base;
            const uint64_t n_bytes = padded(t, frame);
            if (s->targets[i] == 0) {
                s->targets[i] = room;
                room += s->step;
            }
            seed[k] = t->offsets[frame] + t->file_id;
            digest[k] = t->digests[frame];
            check_length[k] = t->stored[frame];
            n_pieces = add_piece(address, length, start, n_pieces, s->targets[i], (int64_t)n_bytes);
            if (i + 1 < stop) {
                const uint64_t gap = t->offsets[s->frames[i + 1]] - t->offsets[frame] - n_bytes;
                n_pieces = add_piece(address, length, start, n_pieces, s->trash, (int64_t)gap);
            }
        }
    }
    piece_start[s->n] = n_pieces;
    check_start[s->n] = (int32_t)m;
    *batch = (fl_batch){
        .n_extents = s->n, .n_iov = (size_t)n_pieces, .n_checks = m,
        .offset = s->offset, .length = s->length, .iov_start = piece_start,
        .iov_address = address, .iov_length = length, .check_start = check_start,
        .check_address = s->targets + base, .check_length = check_length,
        .check_seed = seed, .check_digest = digest,
    };
    return memory;
}
