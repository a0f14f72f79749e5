/* See fl_bring.h. */
#include "fl_bring.h"

#include <errno.h>
#include <stdlib.h>

/* As offload/demand.py has them, and why. */
enum { PARTS_PER_WAVE = 4, PART_BYTES = 256 * 1024 };

static size_t smaller_of(size_t a, size_t b) { return a < b ? a : b; }

/* How many ids lie before `frame`. */
static size_t ids_before(const fl_bring *b, int32_t frame)
{
    const int64_t id = (int64_t)frame * b->per_frame;
    size_t low = b->stop, high = b->n_ids;

    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (b->ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static size_t n_missing(const fl_bring *b) { return (size_t)b->first[b->n_extents]; }

/* Submit the next wave into the half of `wave`: as many extents as it has room for. */
static int submit(fl_bring *b, size_t wave, fl_failure *failure)
{
    fl_wave *w = &b->waves[wave % 2];
    size_t room = b->half_bytes / b->step, e = b->n_submitted;
    int64_t n_bytes = 0;
    int refused = 0;

    for (; e < b->n_extents; e++) {
        size_t lent = 0;
        for (int32_t i = b->first[e]; i < b->first[e + 1]; i++) lent += b->targets[i] == 0;
        if (lent > room && e > b->n_submitted) break;
        room -= smaller_of(lent, room); /* one alone that is too much is refused below */
        n_bytes += b->length[e];
    }
    *w = (fl_wave){NULL, b->n_submitted, e, 0, 0};
    if (e == w->start) return FL_READ_OK;

    const size_t n = e - w->start;
    const fl_scatter s = {n, b->first + w->start, b->missing, b->offset + w->start,
                          b->length + w->start, b->targets, b->halves[wave % 2],
                          b->halves[wave % 2] + b->half_bytes, b->step, b->trash};
    const size_t parts = smaller_of(smaller_of(PARTS_PER_WAVE, n), 1 + (size_t)n_bytes / PART_BYTES);
    fl_batch batch;
    void *memory = fl_frames_scatter(b->tables, &s, &batch, &refused);
    int status = FL_SYSTEM;

    *failure = (fl_failure){.error = ENOMEM};
    if (memory) {
        status = fl_reader_submit(b->reader, &batch, 0, &w->ticket, failure);
        free(memory);
    } else if (refused)
        status = FL_REFUSED;
    if (status != FL_READ_OK) {
        failure->extent += (int64_t)w->start;
        w->ticket = NULL;
        return status;
    }
    w->step = (n + parts - 1) / parts;
    b->n_submitted = e;
    b->n_bytes += n_bytes;
    return FL_READ_OK;
}

static int fits(const fl_bring *b)
{
    if (b->per_frame < 1 || b->step == 0 || b->first[0] != 0) return 0;
    for (size_t e = 0; e < b->n_extents; e++)
        if (b->first[e + 1] <= b->first[e]) return 0;
    for (size_t i = 0; i < n_missing(b); i++) {
        const int32_t frame = b->missing[i];
        if (frame < 0 || (size_t)frame >= b->tables->n_frames || b->addresses[frame] != 0) return 0;
        if (i > 0 && frame <= b->missing[i - 1]) return 0;
    }
    return 1;
}

int fl_bring_start(fl_bring *b, fl_failure *failure)
{
    *failure = (fl_failure){0};
    if (!fits(b)) return FL_REFUSED;
    for (size_t wave = 0; wave < 2; wave++) {
        const int status = submit(b, wave, failure);
        if (status != FL_READ_OK) {
            fl_bring_end(b);
            return status;
        }
    }
    return FL_READ_OK;
}

static void take_back(fl_bring *b)
{
    for (; b->shown < b->given; b->shown++) {
        const int32_t frame = b->missing[b->shown];
        if (b->frame_slot[frame] < 0) b->addresses[frame] = 0;
    }
}

static void show(fl_bring *b, size_t upto)
{
    for (; b->given < upto; b->given++) b->addresses[b->missing[b->given]] = b->targets[b->given];
    b->from = b->stop;
    b->stop = upto < n_missing(b) ? ids_before(b, b->missing[upto]) : b->n_ids;
}

int fl_bring_next(fl_bring *b, int64_t slice_ns, fl_failure *failure)
{
    fl_wave *w = &b->waves[b->wave % 2];

    take_back(b);
    if (!b->begun) { /* what is there already, while the first reads are under way */
        b->begun = 1;
        show(b, 0);
        return FL_READ_OK;
    }
    if (w->ticket && w->done == w->stop - w->start) {
        fl_ticket_free(w->ticket);
        w->ticket = NULL;
        b->wave++;
        const int status = submit(b, b->wave + 1, failure);
        if (status != FL_READ_OK) return status;
        w = &b->waves[b->wave % 2];
    }
    if (!w->ticket) {
        show(b, n_missing(b));
        return FL_READ_OK;
    }
    const size_t upto = smaller_of(w->stop - w->start, w->done + w->step);
    if (fl_ticket_done(w->ticket) < (int64_t)upto) {
        const uint64_t since = fl_source_now();
        const int status = fl_ticket_wait(w->ticket, (int64_t)upto, slice_ns, failure);
        b->wait_ns += (int64_t)(fl_source_now() - since);
        if (status != FL_READ_OK) {
            failure->extent += (int64_t)w->start;
            return status;
        }
    }
    w->done = smaller_of((size_t)fl_ticket_done(w->ticket), w->stop - w->start);
    show(b, (size_t)b->first[w->start + w->done]);
    return FL_READ_OK;
}

void fl_bring_end(fl_bring *b)
{
    for (int i = 0; i < 2; i++) {
        if (b->waves[i].ticket) fl_ticket_free(b->waves[i].ticket);
        b->waves[i].ticket = NULL;
    }
    take_back(b);
}
