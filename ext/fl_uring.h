/* A ring of the kernel's own asynchronous reads (io_uring), driven by one thread.
 *
 * Knows descriptors, offsets, iovecs and tags; what is read, in which order and what becomes of it
 * is fl_reader's.  Everything but open, wake and the closing belongs to the one thread that called
 * fl_uring_begin.  Needs Linux 6.1 or newer and leave to use it: containers often forbid the calls,
 * so that it is asked by opening one. */
#ifndef FL_URING_H
#define FL_URING_H

#include <stdint.h>
#include <sys/uio.h>

typedef struct fl_uring fl_uring;

typedef struct {
    uint32_t tag;
    int64_t result; /* bytes read, or minus an errno */
} fl_uring_done;

/* For up to `depth` reads unanswered; NULL and *error (errno; ENOSYS where this was built without). */
fl_uring *fl_uring_open(int depth, int *error);

/* The thread that will drive it says so, before anything else.  Reads that would block before they
 * reach the device (FUSE's all do) are done by up to `n_workers` threads of the kernel's. */
void fl_uring_begin(fl_uring *u, int n_workers);

/* Prepares a read; it begins with the next fl_uring_wait.  The destinations, and the iovecs until
 * that call has returned, belong to the caller.  More than a call takes is read in part. */
void fl_uring_read(fl_uring *u, int fd, int64_t offset, const struct iovec *iov, int n_iov,
                   uint32_t tag);

/* Begins what is prepared and sleeps until `wanted` reads are answered or somebody wakes it: how
 * many of `done` were filled, up to `room`; 0 when woken.  After a millisecond one is enough, so
 * that reads which never come do not hold up others.  What the kernel does not take is answered with
 * its error. */
int fl_uring_wait(fl_uring *u, fl_uring_done *done, int room, int wanted);

/* From any thread: let the next, or the present, fl_uring_wait return. */
void fl_uring_wake(fl_uring *u);

/* By the driving thread, with nothing unanswered: afterwards the kernel writes nowhere. */
void fl_uring_end(fl_uring *u);

/* After the driving thread has ended, or never began; or in a forked child, which has none of the
 * ring's memory (`is_child`). */
void fl_uring_close(fl_uring *u, int is_child);

#endif
