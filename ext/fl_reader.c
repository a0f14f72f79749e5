/* The reader: one mutex, a list of tickets, and `depth` threads or one with a ring.
 *
 * One mutex is enough: at 50,000 reads a second it is held for about a hundred nanoseconds each.
 * It also makes lifetimes simple: a thread touches a ticket after a read only under the mutex, and
 * a closer leaves only when it has seen, under the mutex, that nothing is in flight. */
#include "fl_reader.h"

#include "fl_uring.h"
#include "fl_xxh64.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Threads keep no large locals.  Libraries with much thread-local data may need the second try. */
static const size_t STACK_BYTES[] = {128 << 10, 1 << 20};

/* How far a mapping is advised ahead of the extent being copied: enough reads to fill the device's
 * queue, few enough bytes that the page cache stays a small, known amount.  Topped up in strides,
 * so that neighbours are advised together. */
enum { AHEAD_EXTENTS = 32, AHEAD_STRIDE = 16, AHEAD_BYTES = 8 << 20 };

/* Reads longer than LONG_BYTES share the device's rate: the more are in flight, the later the first of
 * them comes, and that is the one waited for.  Measured with 1 MiB each and stages for 23: 12 at once
 * served 13.2 tokens a second where 16 served 11.7; on another device 6 served 1.07 times what 12 did
 * (medians), which alone came at 1.2 GB/s where 4 came at 1.6.
 * Others cost operations: the more at once the better. */
enum { LONG_BYTES = 64 << 10, LONG_IN_FLIGHT = 6 << 20 };

/* So many answers are taken from a ring before it is filled up again.  While it is full of brief reads
 * so many are waited for: a wake-up costs as much processor time as one of them. */
enum { ANSWERS = 4 };

/* A batch whose extents are longer than this on average is read by threads although there is a ring:
 * with one thread alone for their checksums streaming was 3 % slower, and picks in a fitted order 5. */
enum { RING_MEAN_BYTES = 16 << 10 };

enum { WAITING = 0, ARRIVED = 1, FAILED = 2 };

typedef struct {
    int64_t offset, length;
    uint32_t iov, n_iov, check, n_checks;
} extent;

typedef struct {
    const void *address;
    size_t length;
    uint64_t seed, digest;
} check;

struct fl_ticket {
    fl_reader *reader;
    fl_ticket *next;
    pthread_cond_t moved;
    int64_t n, taken, advised, in_flight;
    int64_t prefix;              /* extents before it are settled: arrived or failed */
    atomic_int_fast64_t arrived; /* the prefix, or up to the first failure; read without the lock */
    int64_t n_waiting, wanted;
    int closed, is_long, is_ahead;
    fl_failure failure; /* of the lowest failed extent so far; extent = n when none */
    extent *extents;
    struct iovec *iov;
    check *checks;
    uint8_t *state;
};

/* A read in the ring, or what became of it in a thread's hands. */
typedef struct lane {
    fl_ticket *ticket;
    int64_t index;
    uint64_t begun; /* ns */
    int round;      /* of read_extent, for the thread that goes on with it */
    struct lane *next;
} lane;

struct fl_reader {
    fl_source source;
    pid_t pid;
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    fl_ticket *head, *tail;
    int64_t long_bytes; /* of long reads in flight */
    int depth, n_threads, n_users, closed;
    fl_uring *ring; /* NULL: the threads read */
    lane *lanes, *free_lanes, *handed, **handed_end;
    int ring_sleeps;
    pthread_t threads[]; /* with a ring the first drives it, and `depth` more read by hand */
};

const fl_source *fl_reader_source(const fl_reader *r) { return &r->source; }

static int forked(const fl_reader *r) { return r->pid != getpid(); }

/* ------------------------------------------------------------------------------- the threads */

static int verify(const fl_ticket *t, const extent *e, fl_failure *failure)
{
    for (uint32_t k = 0; k < e->n_checks; k++) {
        const check *c = &t->checks[e->check + k];
        const uint64_t found = fl_xxh64(c->address, c->length, c->seed);
        if (found != c->digest) {
            failure->kind = FL_FAIL_CHECK;
            failure->check = k;
            failure->offset = e->offset;
            failure->expected = c->digest;
            failure->found = found;
            return FL_FAIL_CHECK;
        }
    }
    return FL_READ_OK;
}

/* In a mapping the next extent's first page may be advised already: leave it a shared page.
 * A buffered read fetches its own first page in the same request, so there nothing is lost. */
static int what_to_leave(const fl_ticket *t, int64_t index)
{
    const extent *e = &t->extents[index];
    const int64_t page = t->reader->source.os_page, stop = e->offset + e->length;
    const int is_shared = t->reader->source.mode == FL_MMAP && index + 1 < t->n &&
                          t->extents[index + 1].offset / page == stop / page;

    return FL_LEAVE_BLOCKS | (is_shared ? FL_LEAVE_LAST_PAGE : 0);
}

/* `round` is 1 when bytes have come once and were wrong. */
static int read_extent(fl_ticket *t, int64_t index, int round, fl_failure *failure)
{
    const extent *e = &t->extents[index];
    fl_source *s = &t->reader->source;
    int kind = FL_READ_OK;

    /* Twice when the bytes are wrong: a bad transfer is worth one more, bad flash is not. */
    for (; round < 2; round++) {
        fl_source_begin(s, e->offset, e->length);
        kind = fl_source_read(s, e->offset, e->length, t->iov + e->iov, (int)e->n_iov, failure);
        if (kind == FL_READ_OK)
            kind = verify(t, e, failure);
        fl_source_end(s, e->offset, e->length,
                      kind == FL_READ_OK ? what_to_leave(t, index) : FL_LEAVE_NOTHING);
        if (kind != FL_FAIL_CHECK)
            break;
        if (round == 0)
            atomic_fetch_add(&s->n_retries, 1);
    }
    failure->extent = index;
    return kind;
}

/* Under the lock: which extents to advise now that `index` is taken; 0 when enough are. */
static int64_t plan_ahead(fl_ticket *t, int64_t index, int64_t *first)
{
    int64_t stop = t->advised > index ? t->advised : index, bytes = 0;

    if (t->reader->source.mode != FL_MMAP || (t->advised - index > AHEAD_STRIDE))
        return 0;
    *first = stop;
    for (int64_t i = index; i < stop; i++)
        bytes += t->extents[i].length;
    while (stop < t->n && stop < index + AHEAD_EXTENTS &&
           (stop == index || bytes + t->extents[stop].length <= AHEAD_BYTES))
        bytes += t->extents[stop++].length;
    t->advised = stop;
    return stop - *first;
}

static void advise_ahead(fl_ticket *t, int64_t first, int64_t n)
{
    fl_source *s = &t->reader->source;
    int64_t start = t->extents[first].offset, stop = start;

    for (int64_t i = first; i < first + n; i++) {
        const extent *e = &t->extents[i];
        if (fl_source_in_blocks(s, e->length))
            continue;
        if (e->offset != stop) {
            fl_source_ahead(s, start, stop - start);
            start = e->offset;
        }
        stop = e->offset + e->length;
    }
    fl_source_ahead(s, start, stop - start);
}

static void settle(fl_ticket *t, int64_t index, int kind, const fl_failure *failure)
{
    int64_t prefix = t->prefix;

    t->state[index] = kind == FL_READ_OK ? ARRIVED : FAILED;
    if (kind != FL_READ_OK && index < t->failure.extent)
        t->failure = *failure;
    while (prefix < t->n && t->state[prefix] != WAITING)
        prefix++;
    t->prefix = prefix;
    t->in_flight--;
    atomic_store(&t->arrived, prefix < t->failure.extent ? prefix : t->failure.extent);
    if (t->n_waiting && (prefix >= t->wanted || t->failure.extent < prefix ||
                         (t->closed && t->in_flight == 0)))
        pthread_cond_broadcast(&t->moved);
}

/* What an extent counts among the long reads. */
static int64_t long_bytes(const fl_ticket *t, int64_t index)
{
    const int64_t length = t->extents[index].length;

    return length > LONG_BYTES ? length : 0;
}

/* Under the lock: is there a next extent, and may it be begun now? */
static int may_begin(const fl_reader *r)
{
    const int64_t more = r->head ? long_bytes(r->head, r->head->taken) : 0;

    return r->head && (more == 0 || r->long_bytes == 0 || r->long_bytes + more <= LONG_IN_FLIGHT);
}

/* Under the lock, when may_begin: the next extent is in flight. */
static fl_ticket *take(fl_reader *r, int64_t *index)
{
    fl_ticket *t = r->head;

    *index = t->taken++;
    t->in_flight++;
    r->long_bytes += long_bytes(t, *index);
    if (t->taken == t->n) {
        r->head = t->next;
        if (!r->head)
            r->tail = NULL;
    }
    return t;
}

/* Under the lock: it is no more. */
static void finish(fl_reader *r, fl_ticket *t, int64_t index, int kind, const fl_failure *failure)
{
    r->long_bytes -= long_bytes(t, index);
    settle(t, index, kind, failure);
}

/* Under the lock: is there something for a thread to begin?  Beside a ring only when the ring's has
 * started them. */
static int threads_may_begin(const fl_reader *r)
{
    return may_begin(r) && (!r->ring || (r->n_threads > 1 && r->head->is_long));
}

static int ring_may_begin(const fl_reader *r)
{
    return r->ring && r->free_lanes && may_begin(r) && !threads_may_begin(r);
}

/* Under the lock: whoever is to begin the next extent, and sleeps. */
static void rouse(fl_reader *r)
{
    if (threads_may_begin(r))
        pthread_cond_signal(&r->work);
    if (r->ring_sleeps && (r->closed || ring_may_begin(r))) {
        r->ring_sleeps = 0;
        fl_uring_wake(r->ring);
    }
}

/* Under the lock: the extent of `l` has been read, or never will be. */
static void leave(fl_reader *r, lane *l, int kind, const fl_failure *failure)
{
    finish(r, l->ticket, l->index, kind, failure);
    l->next = r->free_lanes;
    r->free_lanes = l;
}

/* Under the lock: what the ring could not read, with blocking calls, which repeat and word what is
 * wrong. */
static void read_handed(fl_reader *r)
{
    lane *l = r->handed;
    fl_failure failure = {0};

    r->handed = l->next;
    if (!r->handed)
        r->handed_end = &r->handed;
    pthread_mutex_unlock(&r->lock);
    const int kind = read_extent(l->ticket, l->index, l->round, &failure);
    pthread_mutex_lock(&r->lock);
    leave(r, l, kind, &failure);
    rouse(r);
}

/* Under the lock, when threads_may_begin. */
static void read_next(fl_reader *r)
{
    int64_t index, first = 0;
    fl_failure failure = {0};
    fl_ticket *t = take(r, &index);
    const int64_t n_ahead = plan_ahead(t, index, &first);

    rouse(r); /* those who slept while this one was next */
    pthread_mutex_unlock(&r->lock);
    if (n_ahead)
        advise_ahead(t, first, n_ahead);
    const int kind = read_extent(t, index, 0, &failure);
    pthread_mutex_lock(&r->lock);
    finish(r, t, index, kind, &failure);
    if (r->ring) /* the next may be the ring's, and have waited for this one's bytes */
        rouse(r);
}

static void *serve(void *argument)
{
    fl_reader *r = argument;

    pthread_mutex_lock(&r->lock);
    while (!r->closed || r->handed) {
        if (r->handed)
            read_handed(r);
        else if (threads_may_begin(r))
            read_next(r);
        else
            pthread_cond_wait(&r->work, &r->lock);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* Under the lock.  Up to `n` threads that run `body`; the errno that prevented even one, or 0. */
static int start_threads(fl_reader *r, void *(*body)(void *), int n, const char *what)
{
    sigset_t blocked, before;
    pthread_attr_t attributes;
    const int first = r->n_threads;
    int error = 0;

    /* Signals belong to the interpreter's threads; faults stay deliverable here. */
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGABRT);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_attr_init(&attributes);
    for (size_t k = 0; k < sizeof STACK_BYTES / sizeof *STACK_BYTES && r->n_threads == first; k++) {
        if (pthread_attr_setstacksize(&attributes, STACK_BYTES[k]))
            continue;
        for (error = 0; r->n_threads < first + n && !error;) {
            error = pthread_create(&r->threads[r->n_threads], &attributes, body, r);
            if (!error) {
                char name[16];
                snprintf(name, sizeof name, "fl-%s-%d", what, r->n_threads - first);
                pthread_setname_np(r->threads[r->n_threads++], name);
            }
        }
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r->n_threads > first ? 0 : error;
}

/* --------------------------------------------------------------------------------- the ring */

/* Under the lock, by the ring's thread: there are others, which start when the first is needed. */
static int have_threads(fl_reader *r)
{
    return r->n_threads > 1 || !start_threads(r, serve, r->depth, "read");
}

/* Under the lock.  Whether a thread will read it. */
static int hand_over(fl_reader *r, lane *l)
{
    if (r->closed || !have_threads(r))
        return 0;
    l->next = NULL;
    *r->handed_end = l;
    r->handed_end = &l->next;
    pthread_cond_signal(&r->work);
    return 1;
}

/* Only a whole extent of right bytes is taken from the ring: anything else is read again by hand, so
 * that what is repeated and what is said of it are the same as without one. */
static void answered(fl_reader *r, lane *l, int64_t result)
{
    const int64_t length = l->ticket->extents[l->index].length;
    fl_failure failure = {.extent = l->index};
    int kind = FL_READ_OK, is_handed = 0;

    fl_source_count(&r->source, result, l->begun);
    l->round = result == length;
    if (l->round)
        kind = verify(l->ticket, &l->ticket->extents[l->index], &failure);
    const int is_good = l->round && kind == FL_READ_OK;
    if (kind == FL_FAIL_CHECK)
        atomic_fetch_add(&r->source.n_retries, 1);
    pthread_mutex_lock(&r->lock);
    r->ring_sleeps = 0;
    if (!is_good && !(is_handed = hand_over(r, l))) {
        pthread_mutex_unlock(&r->lock);
        kind = read_extent(l->ticket, l->index, l->round, &failure);
        pthread_mutex_lock(&r->lock);
    }
    if (!is_handed)
        leave(r, l, kind, &failure);
    pthread_mutex_unlock(&r->lock);
}

static void *serve_ring(void *argument)
{
    fl_reader *r = argument;
    fl_uring_done done[ANSWERS];
    int in_ring = 0;

    fl_uring_begin(r->ring, r->depth);
    pthread_mutex_lock(&r->lock);
    while (!r->closed || in_ring) {
        const uint64_t now = fl_source_now();
        while (!r->closed && ring_may_begin(r) && !(r->head->is_long && have_threads(r))) {
            lane *l = r->free_lanes;
            r->free_lanes = l->next;
            l->ticket = take(r, &l->index);
            l->begun = now;
            in_ring++;
            const extent *e = &l->ticket->extents[l->index];
            fl_uring_read(r->ring, r->source.fd, e->offset, l->ticket->iov + e->iov,
                          (int)e->n_iov, (uint32_t)(l - r->lanes));
        }
        rouse(r); /* threads, when they are next */
        r->ring_sleeps = 1;
        const int is_full = !r->free_lanes && may_begin(r) && in_ring >= 2 * ANSWERS;
        pthread_mutex_unlock(&r->lock);
        const int n = fl_uring_wait(r->ring, done, ANSWERS, is_full ? ANSWERS : 1);
        for (int i = 0; i < n; i++)
            answered(r, &r->lanes[done[i].tag], done[i].result);
        in_ring -= n;
        pthread_mutex_lock(&r->lock);
        r->ring_sleeps = 0;
    }
    pthread_mutex_unlock(&r->lock);
    fl_uring_end(r->ring);
    return NULL;
}

/* Under the lock: somebody reads.  0 or an errno. */
static int start(fl_reader *r)
{
    if (r->n_threads)
        return 0;
    return r->ring ? start_threads(r, serve_ring, 1, "ring")
                   : start_threads(r, serve, r->depth, "read");
}

/* ----------------------------------------------------------------------------------- reader */

static void open_ring(fl_reader *r, int depth, int *error)
{
    r->lanes = calloc((size_t)depth, sizeof *r->lanes);
    *error = ENOMEM;
    if (r->lanes)
        r->ring = fl_uring_open(depth, error);
    if (!r->ring)
        return;
    *error = 0;
    for (int k = depth; k-- > 0;) {
        r->lanes[k].next = r->free_lanes;
        r->free_lanes = &r->lanes[k];
    }
    r->handed_end = &r->handed;
}

fl_reader *fl_reader_open(int fd, int mode, int64_t size, int depth, int ring_depth,
                          int64_t alignment, int64_t memory_alignment, int *ring_error, int *error)
{
    fl_reader *r = calloc(1, sizeof *r + (size_t)(depth + 1) * sizeof(pthread_t));

    *error = ENOMEM;
    if (!r)
        return NULL;
    *error = fl_source_open(&r->source, fd, mode, size, alignment, memory_alignment);
    if (*error) {
        free(r);
        return NULL;
    }
    r->pid = getpid();
    r->depth = depth;
    if (ring_depth)
        open_ring(r, ring_depth, ring_error);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->idle, NULL);
    return r;
}

void fl_reader_close(fl_reader *r)
{
    if (forked(r)) {
        /* Nobody to wait for, and the lock may be held by a thread that is not here. */
        if (!r->closed) {
            fl_source_close(&r->source);
            fl_uring_close(r->ring, 1);
        }
        r->closed = 1;
        return;
    }
    pthread_mutex_lock(&r->lock);
    const int first = !r->closed;
    r->closed = 1;
    for (fl_ticket *t = r->head; t; t = t->next) {
        t->closed = 1;
        pthread_cond_broadcast(&t->moved);
    }
    r->head = r->tail = NULL;
    pthread_cond_broadcast(&r->work);
    rouse(r);
    while (first && r->n_users)
        pthread_cond_wait(&r->idle, &r->lock);
    while (!first && r->source.fd >= 0)
        pthread_cond_wait(&r->idle, &r->lock);
    pthread_mutex_unlock(&r->lock);
    if (!first)
        return;
    for (int i = 0; i < r->n_threads; i++)
        pthread_join(r->threads[i], NULL);
    fl_uring_close(r->ring, 0);
    pthread_mutex_lock(&r->lock);
    fl_source_close(&r->source);
    pthread_cond_broadcast(&r->idle);
    pthread_mutex_unlock(&r->lock);
}

void fl_reader_free(fl_reader *r)
{
    fl_reader_close(r);
    if (!forked(r)) {
        pthread_cond_destroy(&r->idle);
        pthread_cond_destroy(&r->work);
        pthread_mutex_destroy(&r->lock);
    }
    free(r->lanes);
    free(r);
}

int fl_reader_read(fl_reader *r, int64_t offset, int64_t length, uint8_t *out, fl_failure *failure)
{
    if (forked(r))
        return FL_FORKED;
    pthread_mutex_lock(&r->lock);
    const int closed = r->closed;
    r->n_users += !closed;
    pthread_mutex_unlock(&r->lock);
    if (closed)
        return FL_CLOSED;
    failure->extent = -1;
    const int kind = fl_source_copy(&r->source, offset, length, out, failure);
    pthread_mutex_lock(&r->lock);
    if (--r->n_users == 0)
        pthread_cond_broadcast(&r->idle);
    pthread_mutex_unlock(&r->lock);
    return kind;
}

/* ----------------------------------------------------------------------------------- tickets */

static int refusal(const fl_reader *r, const fl_batch *b, size_t e)
{
    const int64_t a = r->source.alignment, ma = r->source.memory_alignment;
    const int64_t length = b->length[e];
    int64_t sum = 0;

    if (b->offset[e] < 0 || length < 1 || b->offset[e] > INT64_MAX - length - (1 << 20))
        return FL_BAD_RANGE;
    if (b->iov_start[e] < 0 || b->iov_start[e + 1] < b->iov_start[e] ||
        (size_t)b->iov_start[e + 1] > b->n_iov || b->check_start[e] < 0 ||
        b->check_start[e + 1] < b->check_start[e] ||
        (size_t)b->check_start[e + 1] > b->n_checks)
        return FL_BAD_START;
    for (int32_t i = b->iov_start[e]; i < b->iov_start[e + 1]; i++) {
        if (b->iov_length[i] < 1 || b->iov_length[i] > length - sum)
            return FL_BAD_SUM;
        sum += b->iov_length[i];
        if (b->iov_length[i] % a || b->iov_address[i] % (uint64_t)ma)
            return FL_BAD_ALIGNMENT;
    }
    if (sum != length)
        return FL_BAD_SUM;
    if (b->offset[e] % a)
        return FL_BAD_ALIGNMENT;
    for (int32_t k = b->check_start[e]; k < b->check_start[e + 1]; k++)
        if (b->check_length[k] < 0)
            return FL_BAD_CHECK;
    return 0;
}

/* As `refusal`, for the only extent of a run. */
static int run_refusal(const fl_reader *r, const fl_run *run)
{
    const int64_t a = r->source.alignment, ma = r->source.memory_alignment;

    if (run->offset < 0 || run->length < 1 || run->offset > INT64_MAX - run->length - (1 << 20))
        return FL_BAD_RANGE;
    if (run->offset % a || run->length % a || run->address % (uint64_t)ma)
        return FL_BAD_ALIGNMENT;
    for (size_t i = 0; i < run->n_frames; i++) {
        const uint64_t at = run->offsets[i] - (uint64_t)run->offset; /* wraps when before it */
        if (at > (uint64_t)run->length || run->stored[i] > (uint64_t)run->length - at)
            return FL_BAD_CHECK;
    }
    return 0;
}

/* A ticket with room for so many; its arrays are not filled.  NULL without memory. */
static fl_ticket *new_ticket(fl_reader *r, size_t n_extents, size_t n_iov, size_t n_checks)
{
    const size_t extents_at = (sizeof(fl_ticket) + 63) / 64 * 64;
    const size_t iov_at = extents_at + n_extents * sizeof(extent);
    const size_t checks_at = iov_at + n_iov * sizeof(struct iovec);
    const size_t state_at = checks_at + n_checks * sizeof(check);
    fl_ticket *t = calloc(1, state_at + n_extents);

    if (!t)
        return NULL;
    t->reader = r;
    t->n = (int64_t)n_extents;
    t->failure.extent = t->n;
    t->extents = (extent *)((uint8_t *)t + extents_at);
    t->iov = (struct iovec *)((uint8_t *)t + iov_at);
    t->checks = (check *)((uint8_t *)t + checks_at);
    t->state = (uint8_t *)t + state_at;

    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&t->moved, &clock);
    pthread_condattr_destroy(&clock);
    return t;
}

static fl_ticket *copy_batch(fl_reader *r, const fl_batch *b)
{
    fl_ticket *t = new_ticket(r, b->n_extents, b->n_iov, b->n_checks);

    if (!t)
        return NULL;
    for (size_t e = 0; e < b->n_extents; e++)
        t->extents[e] = (extent){b->offset[e],
                                 b->length[e],
                                 (uint32_t)b->iov_start[e],
                                 (uint32_t)(b->iov_start[e + 1] - b->iov_start[e]),
                                 (uint32_t)b->check_start[e],
                                 (uint32_t)(b->check_start[e + 1] - b->check_start[e])};
    for (size_t i = 0; i < b->n_iov; i++)
        t->iov[i] = (struct iovec){(void *)(uintptr_t)b->iov_address[i], (size_t)b->iov_length[i]};
    for (size_t k = 0; k < b->n_checks; k++)
        t->checks[k] = (check){(const void *)(uintptr_t)b->check_address[k],
                               (size_t)b->check_length[k], b->check_seed[k], b->check_digest[k]};
    return t;
}

static fl_ticket *copy_run(fl_reader *r, const fl_run *run)
{
    fl_ticket *t = new_ticket(r, 1, 1, run->n_frames);

    if (!t)
        return NULL;
    t->extents[0] = (extent){run->offset, run->length, 0, 1, 0, (uint32_t)run->n_frames};
    t->iov[0] = (struct iovec){(void *)(uintptr_t)run->address, (size_t)run->length};
    for (size_t i = 0; i < run->n_frames; i++) {
        const uint64_t address = run->address + (run->offsets[i] - (uint64_t)run->offset);
        t->checks[i] = (check){(const void *)(uintptr_t)address, run->stored[i],
                               run->offsets[i] + run->file_id, run->digests[i]};
    }
    return t;
}

/* Under the lock.  What is wanted now passes what is read ahead: behind a ring of 32 MiB it waited for
 * all of that, and the device for the caller, who took it up afterwards (a ReLU of 1 GiB in half of
 * its size: 1.4 times the tokens, medians of three pairs). */
static void enqueue(fl_reader *r, fl_ticket *t)
{
    fl_ticket **at = t->is_ahead && r->tail ? &r->tail->next : &r->head;

    while (*at && !(*at)->is_ahead)
        at = &(*at)->next;
    t->next = *at;
    *at = t;
    if (!t->next)
        r->tail = t;
}

/* Queues `t`, which is freed when that cannot be; NULL: there was no memory for it. */
static int queue_ticket(fl_reader *r, fl_ticket *t, int is_ahead, fl_ticket **ticket,
                        fl_failure *failure)
{
    if (!t) {
        failure->error = ENOMEM;
        return FL_SYSTEM;
    }
    t->is_ahead = is_ahead;
    pthread_mutex_lock(&r->lock);
    int status = r->closed ? FL_CLOSED : FL_READ_OK;
    if (status == FL_READ_OK && t->n > 0) {
        int64_t n_bytes = 0;
        for (int64_t i = 0; i < t->n; i++)
            n_bytes += t->extents[i].length / t->n;
        t->is_long = n_bytes > RING_MEAN_BYTES;
        failure->error = start(r);
        status = failure->error ? FL_SYSTEM : FL_READ_OK;
    }
    if (status == FL_READ_OK && t->n > 0) {
        enqueue(r, t);
        rouse(r); /* one, who rouses the next: sixteen would take the processor from whoever asks */
    }
    pthread_mutex_unlock(&r->lock);
    if (status != FL_READ_OK) {
        pthread_cond_destroy(&t->moved);
        free(t);
        return status;
    }
    *ticket = t;
    return FL_READ_OK;
}

int fl_reader_submit(fl_reader *r, const fl_batch *batch, int is_ahead, fl_ticket **ticket,
                     fl_failure *failure)
{
    if (forked(r))
        return FL_FORKED;
    for (size_t e = 0; e < batch->n_extents; e++) {
        failure->kind = refusal(r, batch, e);
        failure->extent = (int64_t)e;
        if (failure->kind)
            return FL_REFUSED;
    }
    return queue_ticket(r, copy_batch(r, batch), is_ahead, ticket, failure);
}

int fl_reader_submit_run(fl_reader *r, const fl_run *run, fl_ticket **ticket, fl_failure *failure)
{
    if (forked(r))
        return FL_FORKED;
    failure->kind = run_refusal(r, run);
    failure->extent = 0;
    if (failure->kind)
        return FL_REFUSED;
    return queue_ticket(r, copy_run(r, run), 1, ticket, failure);
}

int fl_ticket_wait(fl_ticket *t, int64_t upto, int64_t slice_ns, fl_failure *failure)
{
    fl_reader *r = t->reader;
    struct timespec until;
    int status = FL_READ_OK, late = 0;

    if (forked(r))
        return FL_FORKED;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(slice_ns % 1000000000);
    until.tv_sec += (time_t)(slice_ns / 1000000000) + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;

    pthread_mutex_lock(&r->lock);
    for (;;) {
        const int64_t prefix = t->prefix;
        if (t->failure.extent < prefix && t->failure.extent < upto) {
            *failure = t->failure;
            status = failure->kind;
            break;
        }
        if (prefix >= upto)
            break;
        if (t->closed && t->in_flight == 0) {
            status = FL_CLOSED;
            break;
        }
        if (late) {
            status = FL_TIMEOUT;
            break;
        }
        if (t->n_waiting == 0 || upto < t->wanted)
            t->wanted = upto; /* the nearest of all waiters */
        t->n_waiting++;
        late = pthread_cond_timedwait(&t->moved, &r->lock, &until) == ETIMEDOUT;
        t->n_waiting--;
    }
    pthread_mutex_unlock(&r->lock);
    return status;
}

int64_t fl_ticket_done(const fl_ticket *t)
{
    return forked(t->reader) ? -1 : atomic_load(&t->arrived);
}

void fl_ticket_close(fl_ticket *t)
{
    fl_reader *r = t->reader;

    if (forked(r))
        return;
    pthread_mutex_lock(&r->lock);
    t->closed = 1;
    for (fl_ticket **at = &r->head, *before = NULL; *at; before = *at, at = &(*at)->next) {
        if (*at == t) {
            *at = t->next;
            if (r->tail == t)
                r->tail = before;
            break;
        }
    }
    rouse(r); /* another extent may be next */
    while (t->in_flight) {
        t->n_waiting++;
        pthread_cond_wait(&t->moved, &r->lock);
        t->n_waiting--;
    }
    pthread_cond_broadcast(&t->moved);
    pthread_mutex_unlock(&r->lock);
}

void fl_ticket_free(fl_ticket *t)
{
    fl_ticket_close(t);
    if (!forked(t->reader))
        pthread_cond_destroy(&t->moved);
    free(t);
}
