/* The ring through raw system calls: two mappings of shared memory and an eventfd.
 *
 * Completions are worked off in the driving thread's own calls (DEFER_TASKRUN) and nobody else
 * touches the ring (SINGLE_ISSUER): measured with 8 KiB reads at 3.6 us of processor time each,
 * where a blocking read of a thread costs 10 to 14.  Reads that would block before they reach the
 * device are done by workers of the kernel's. */
#include "fl_uring.h"

#include <errno.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif

#ifdef IORING_SETUP_DEFER_TASKRUN

#include <limits.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

/* The eventfd's read; no caller's tag is as large. */
static const uint64_t WAKE = UINT64_MAX;
/* The kernel counts lengths in 32 bits and reads at most 2 GiB at once. */
enum { MOST_BYTES = 1 << 30 };

struct fl_uring {
    int fd, wake_fd;
    uint8_t *rings; /* both queues' indices and the completions */
    size_t rings_bytes;
    struct io_uring_sqe *sqes;
    size_t sqes_bytes;
    _Atomic uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct io_uring_cqe *cqes;
    uint32_t prepared; /* the tail as far as it is written, not yet shown to the kernel */
    int is_armed;      /* the eventfd's read is in the ring */
    uint64_t woken;
};

static int setup(unsigned entries, struct io_uring_params *p)
{
    return (int)syscall(SYS_io_uring_setup, entries, p);
}

/* Hands over, and sleeps for so many completions: for more than one not longer than a millisecond. */
static int enter(const fl_uring *u, unsigned n_new, unsigned n_wanted)
{
    const struct __kernel_timespec soon = {0, 1000000};
    const struct io_uring_getevents_arg until = {.ts = n_wanted > 1 ? (uint64_t)(uintptr_t)&soon : 0};

    return (int)syscall(SYS_io_uring_enter, u->fd, n_new, n_wanted,
                        IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &until, sizeof until);
}

/* Of the parent's ring a child of fork has nothing: not mapped, so that it cannot disturb it. */
static void *map(int fd, size_t n_bytes, int64_t offset)
{
    void *at = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

    if (at != MAP_FAILED)
        madvise(at, n_bytes, MADV_DONTFORK);
    return at == MAP_FAILED ? NULL : at;
}

fl_uring *fl_uring_open(int depth, int *error)
{
    struct io_uring_params p = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                         IORING_SETUP_R_DISABLED};
    fl_uring *u = calloc(1, sizeof *u);

    *error = ENOMEM;
    if (!u)
        return NULL;
    u->wake_fd = -1;
    u->fd = setup((unsigned)depth + 1, &p);
    if (u->fd < 0)
        goto failed;
    u->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (u->wake_fd < 0)
        goto failed;
    if (!(p.features & IORING_FEAT_SINGLE_MMAP)) {
        errno = ENOSYS;
        goto failed;
    }
    const size_t sq = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    const size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    u->rings_bytes = sq > cq ? sq : cq;
    u->sqes_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
    u->rings = map(u->fd, u->rings_bytes, IORING_OFF_SQ_RING);
    u->sqes = u->rings ? map(u->fd, u->sqes_bytes, IORING_OFF_SQES) : NULL;
    if (!u->sqes)
        goto failed;
    u->sq_head = (_Atomic uint32_t *)(u->rings + p.sq_off.head);
    u->sq_tail = (_Atomic uint32_t *)(u->rings + p.sq_off.tail);
    u->cq_head = (_Atomic uint32_t *)(u->rings + p.cq_off.head);
    u->cq_tail = (_Atomic uint32_t *)(u->rings + p.cq_off.tail);
    u->cqes = (struct io_uring_cqe *)(u->rings + p.cq_off.cqes);
    u->sq_mask = p.sq_entries - 1;
    u->cq_mask = p.cq_entries - 1;
    /* Entry k of the queue is always entry k of the array. */
    for (uint32_t k = 0; k < p.sq_entries; k++)
        ((uint32_t *)(u->rings + p.sq_off.array))[k] = k;
    return u;
failed:
    *error = errno;
    fl_uring_close(u, 0);
    return NULL;
}

void fl_uring_begin(fl_uring *u, int n_workers)
{
    unsigned most[2] = {(unsigned)n_workers, 0};

    /* What fails here fails every read, and is answered there. */
    syscall(SYS_io_uring_register, u->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    syscall(SYS_io_uring_register, u->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, most, 2);
}

static struct io_uring_sqe *prepare(fl_uring *u, int opcode, int fd, uint64_t tag)
{
    struct io_uring_sqe *sqe = &u->sqes[u->prepared++ & u->sq_mask];

    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = (uint8_t)opcode;
    sqe->fd = fd;
    sqe->user_data = tag;
    return sqe;
}

void fl_uring_read(fl_uring *u, int fd, int64_t offset, const struct iovec *iov, int n_iov,
                   uint32_t tag)
{
    struct io_uring_sqe *sqe;

    if (n_iov == 1) {
        sqe = prepare(u, IORING_OP_READ, fd, tag);
        sqe->addr = (uint64_t)(uintptr_t)iov->iov_base;
        sqe->len = iov->iov_len < MOST_BYTES ? (uint32_t)iov->iov_len : MOST_BYTES;
    } else {
        sqe = prepare(u, IORING_OP_READV, fd, tag);
        sqe->addr = (uint64_t)(uintptr_t)iov;
        sqe->len = (uint32_t)(n_iov < IOV_MAX ? n_iov : IOV_MAX);
    }
    sqe->off = (uint64_t)offset;
}

/* What the kernel did not take, answered with `error`: the queue is ours again from its head on. */
static int refuse(fl_uring *u, int error, fl_uring_done *done, int room)
{
    const uint32_t head = atomic_load_explicit(u->sq_head, memory_order_acquire);
    int n = 0;

    while (u->prepared != head && n < room) {
        const struct io_uring_sqe *sqe = &u->sqes[--u->prepared & u->sq_mask];
        if (sqe->user_data == WAKE)
            u->is_armed = 0;
        else
            done[n++] = (fl_uring_done){(uint32_t)sqe->user_data, -error};
    }
    atomic_store_explicit(u->sq_tail, u->prepared, memory_order_release);
    return n;
}

static int reap(fl_uring *u, fl_uring_done *done, int room, int *woken)
{
    uint32_t head = atomic_load_explicit(u->cq_head, memory_order_relaxed);
    const uint32_t tail = atomic_load_explicit(u->cq_tail, memory_order_acquire);
    int n = 0;

    for (; head != tail && n < room; head++) {
        const struct io_uring_cqe *cqe = &u->cqes[head & u->cq_mask];
        if (cqe->user_data == WAKE) {
            u->is_armed = 0;
            *woken = 1;
        } else {
            done[n++] = (fl_uring_done){(uint32_t)cqe->user_data, cqe->res};
        }
    }
    atomic_store_explicit(u->cq_head, head, memory_order_release);
    return n;
}

/* The kernel does not even let us wait: once a millisecond.  Whether somebody woke us. */
static int look_again(fl_uring *u)
{
    struct pollfd wake = {u->wake_fd, POLLIN, 0};

    nanosleep(&(struct timespec){0, 1000000}, NULL);
    if (poll(&wake, 1, 0) != 1)
        return 0;
    return (wake.revents & POLLNVAL) || read(u->wake_fd, &u->woken, sizeof u->woken) > 0;
}

int fl_uring_wait(fl_uring *u, fl_uring_done *done, int room, int wanted)
{
    int n = 0, woken = 0;

    while (n == 0 && !woken) {
        if (!u->is_armed) {
            struct io_uring_sqe *sqe = prepare(u, IORING_OP_READ, u->wake_fd, WAKE);
            sqe->addr = (uint64_t)(uintptr_t)&u->woken;
            sqe->len = sizeof u->woken;
            u->is_armed = 1;
        }
        atomic_store_explicit(u->sq_tail, u->prepared, memory_order_release);
        const uint32_t n_new = u->prepared - atomic_load_explicit(u->sq_head, memory_order_acquire);
        const uint32_t head = atomic_load_explicit(u->cq_head, memory_order_relaxed);
        const int is_answered = head != atomic_load_explicit(u->cq_tail, memory_order_acquire);
        int error = 0;
        if (n_new || !is_answered)
            error = enter(u, n_new, is_answered ? 0 : (unsigned)wanted) < 0 ? errno : 0;
        wanted = 1;
        if (error && error != EINTR && error != ETIME) {
            n = refuse(u, error, done, room);
            if (n == 0)
                woken = look_again(u);
        }
        n += reap(u, done + n, room - n, &woken);
    }
    return n;
}

void fl_uring_wake(fl_uring *u)
{
    const uint64_t one = 1;

    while (write(u->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void fl_uring_end(fl_uring *u)
{
    fl_uring_done none[1];

    /* The eventfd's read writes into `u`. */
    fl_uring_wake(u);
    fl_uring_wait(u, none, 1, 1);
}

void fl_uring_close(fl_uring *u, int is_child)
{
    if (!u)
        return;
    if (u->sqes && !is_child)
        munmap(u->sqes, u->sqes_bytes);
    if (u->rings && !is_child)
        munmap(u->rings, u->rings_bytes);
    if (u->wake_fd >= 0)
        close(u->wake_fd);
    if (u->fd >= 0)
        close(u->fd);
    free(u);
}

#else

fl_uring *fl_uring_open(int depth, int *error)
{
    *error = ENOSYS;
    return 0;
}

void fl_uring_begin(fl_uring *u, int n_workers) {}
void fl_uring_read(fl_uring *u, int fd, int64_t offset, const struct iovec *iov, int n_iov,
                   uint32_t tag)
{
}
int fl_uring_wait(fl_uring *u, fl_uring_done *done, int room, int wanted) { return 0; }
void fl_uring_wake(fl_uring *u) {}
void fl_uring_end(fl_uring *u) {}
void fl_uring_close(fl_uring *u, int is_child) {}

#endif
