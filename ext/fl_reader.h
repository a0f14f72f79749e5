/* Many reads in flight from native threads: a queue of batches over one fl_source.
 *
 * A batch is copied into one allocation, its ticket.  `depth` threads take its extents in order,
 * read, verify and note each, or one thread that has a ring of them read by the kernel.  Batches are
 * served first come, first served, those that are read ahead when no others are left to begin.
 * Memory named by a batch belongs to the caller and must stay until fl_ticket_close has returned.
 * Every function may be called from any thread of the process that opened the reader; in a forked
 * child, where the threads are gone, all but close and free answer FL_FORKED. */
#ifndef FL_READER_H
#define FL_READER_H

#include <stddef.h>
#include <stdint.h>

#include "fl_source.h"

typedef struct fl_reader fl_reader;
typedef struct fl_ticket fl_ticket;

enum { FL_TIMEOUT = 10, FL_CLOSED = 11, FL_FORKED = 12, FL_SYSTEM = 13, FL_REFUSED = 14 };

/* Why a batch is refused; `extent` in fl_failure says which. */
enum {
    FL_BAD_RANGE = 1,     /* a negative offset, a length below 1, an end beyond 2**63 */
    FL_BAD_START = 2,     /* iov_start or check_start is not ascending within its arrays */
    FL_BAD_SUM = 3,       /* the destinations do not sum to the extent's length */
    FL_BAD_ALIGNMENT = 4, /* FL_DIRECT: an offset, length or address off the alignment */
    FL_BAD_CHECK = 5      /* a check of negative length, or one outside a run */
};

typedef struct {
    size_t n_extents, n_iov, n_checks;
    const int64_t *offset, *length;
    const int32_t *iov_start;
    const uint64_t *iov_address;
    const int64_t *iov_length;
    const int32_t *check_start;
    const uint64_t *check_address;
    const int64_t *check_length;
    const uint64_t *check_seed, *check_digest;
} fl_batch;

/* Frames that lie one after the other in the file, read as one extent to one destination.  The three
 * tables have a row per frame: frame i lies at offsets[i], is stored[i] bytes long, and its check is
 * XXH64 seeded with offsets[i] + file_id.  The same as a batch of one extent, without its arrays. */
typedef struct {
    int64_t offset, length;
    uint64_t address;
    size_t n_frames;
    const uint64_t *offsets;
    const uint32_t *stored;
    const uint64_t *digests;
    uint64_t file_id;
} fl_run;

/* Owns `fd` from success on; NULL and *error (errno) otherwise.  Threads start with the first
 * batch, so that opening a file for its header costs none.  With a `ring_depth` one thread drives a
 * ring of so many reads (fl_uring.h) and `depth` threads do what the ring could not, FL_DIRECT only;
 * when no ring can be had *ring_error is the errno, and the threads read. */
fl_reader *fl_reader_open(int fd, int mode, int64_t size, int depth, int ring_depth,
                          int64_t alignment, int64_t memory_alignment, int *ring_error, int *error);
/* Cancels what is queued, waits for what is in flight, joins the threads; idempotent. */
void fl_reader_close(fl_reader *r);
void fl_reader_free(fl_reader *r);
int fl_reader_read(fl_reader *r, int64_t offset, int64_t length, uint8_t *out, fl_failure *failure);
const fl_source *fl_reader_source(const fl_reader *r);

/* FL_READ_OK and *ticket; FL_REFUSED with failure->kind and ->extent; FL_SYSTEM with ->error.
 * `is_ahead`: nobody waits for it yet.  A run is always read ahead. */
int fl_reader_submit(fl_reader *r, const fl_batch *batch, int is_ahead, fl_ticket **ticket,
                     fl_failure *failure);
int fl_reader_submit_run(fl_reader *r, const fl_run *run, fl_ticket **ticket, fl_failure *failure);

/* Until extents [0, upto) have arrived: FL_READ_OK; FL_FAIL_* of the first that did not; FL_TIMEOUT
 * after `slice_ns`; FL_CLOSED when it never will be. */
int fl_ticket_wait(fl_ticket *t, int64_t upto, int64_t slice_ns, fl_failure *failure);
/* Length of the prefix that has arrived; -1 in a forked child. */
int64_t fl_ticket_done(const fl_ticket *t);
/* Drops what has not begun and waits for what has; idempotent.  Free closes first. */
void fl_ticket_close(fl_ticket *t);
void fl_ticket_free(fl_ticket *t);

#endif
