/* Reading ranges of one file.
 *
 * Every wish for progress is bounded: an interrupted or refused call is repeated at most SOFT_TRIES
 * times without progress, a device error once; a short read goes on where it stopped, inside an
 * iovec if need be, and a read of nothing is the end of the file. */
#include "fl_source.h"

#include "fl_guard.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

enum { SOFT_TRIES = 64, BOUNCE_BYTES = 1 << 20 };
/* Extents from this size on go through blocks: smaller ones would waste most of a block. */
enum { IN_BLOCKS_FROM = 512 << 10 };

uint64_t fl_source_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

void fl_source_count(fl_source *s, int64_t n_bytes, uint64_t begun)
{
    count(&s->read_ns, fl_source_now() - begun);
    count(&s->n_reads, 1);
    if (n_bytes > 0)
        count(&s->bytes_read, (uint64_t)n_bytes);
}

int fl_source_open(fl_source *s, int fd, int mode, int64_t size, int64_t alignment,
                   int64_t memory_alignment)
{
    memset(s, 0, sizeof *s);
    s->mode = mode;
    s->size = size;
    s->alignment = mode == FL_DIRECT ? alignment : 1;
    s->memory_alignment = mode == FL_DIRECT ? memory_alignment : 1;
    s->os_page = sysconf(_SC_PAGESIZE);
    s->map_slot = -1;
    if (mode == FL_MMAP && size > 0) {
        void *map = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            return errno;
        /* Faults bring only what is asked: the device's read-ahead may be megabytes. */
        madvise(map, (size_t)size, MADV_RANDOM);
        s->map_slot = fl_guard_watch(map, (size_t)size);
        if (s->map_slot < 0) {
            munmap(map, (size_t)size);
            return EMFILE;
        }
        s->map = map;
        s->blocks = fl_blocks_open(fd, size);
    }
    /* Read-ahead off: a buffered read then asks for exactly its own pages, in large requests. */
    if (mode != FL_DIRECT)
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    s->fd = fd;
    return 0;
}

void fl_source_close(fl_source *s)
{
    fl_blocks_close(s->blocks);
    s->blocks = NULL;
    if (s->map) {
        fl_guard_forget(s->map_slot);
        munmap(s->map, (size_t)s->size);
        s->map = NULL;
    }
    if (s->fd >= 0)
        close(s->fd);
    s->fd = -1;
}

static int fail(fl_failure *f, int kind, int error, int64_t offset)
{
    f->kind = kind;
    f->error = error;
    f->offset = offset;
    return kind;
}

/* Bytes that arrived before the end of the file, or -1 with `failure` filled in. */
static int64_t fill(fl_source *s, int64_t offset, int64_t length, struct iovec *iov, int n_iov,
                    fl_failure *failure)
{
    int64_t got = 0;
    size_t skip = 0;
    int i = 0, n_soft = 0, n_hard = 0;

    while (got < length) {
        const struct iovec whole = iov[i];
        iov[i].iov_base = (uint8_t *)whole.iov_base + skip;
        iov[i].iov_len = whole.iov_len - skip;
        const uint64_t start = fl_source_now();
        const ssize_t n = preadv(s->fd, iov + i, n_iov - i < IOV_MAX ? n_iov - i : IOV_MAX,
                                 offset + got);
        const int error = errno;
        iov[i] = whole;
        fl_source_count(s, n, start);
        if (n < 0) {
            const int soft = error == EINTR || error == EAGAIN;
            if (soft ? ++n_soft > SOFT_TRIES : error != EIO || n_hard++) {
                fail(failure, FL_FAIL_READ, error, offset + got);
                return -1;
            }
            count(&s->n_retries, 1);
            if (error == EAGAIN)
                nanosleep(&(struct timespec){0, 1000000}, NULL);
            continue;
        }
        if (n == 0)
            break;
        n_soft = 0;
        got += n;
        for (skip += (size_t)n; i < n_iov && skip >= iov[i].iov_len; i++)
            skip -= iov[i].iov_len;
        /* Under O_DIRECT only the end of the file stops a read between two blocks. */
        if (got % s->alignment)
            break;
    }
    return got;
}

/* The same out of the mapping.  A file that shrank inside its last page gives zeros, not a signal:
 * so its size is asked again after the copy. */
static int read_map(fl_source *s, int64_t offset, int64_t length, const struct iovec *iov,
                    int n_iov, fl_failure *failure)
{
    const uint64_t start = fl_source_now();
    const uint8_t *base = fl_source_in_blocks(s, length) ? fl_blocks_base(s->blocks) : s->map;
    const uint8_t *from = base + offset;
    const void *fault = NULL;
    struct stat now;

    for (int i = 0; i < n_iov && !fault; i++) {
        fault = fl_guard_copy(iov[i].iov_base, from, iov[i].iov_len);
        from += iov[i].iov_len;
    }
    fl_source_count(s, 0, start);
    if (fstat(s->fd, &now))
        return fail(failure, FL_FAIL_READ, errno, offset);
    if (now.st_size < offset + length)
        return fail(failure, FL_FAIL_END, 0, now.st_size);
    if (fault)
        return fail(failure, FL_FAIL_READ, EIO, (const uint8_t *)fault - base);
    count(&s->bytes_read, (uint64_t)length);
    return FL_READ_OK;
}

int fl_source_read(fl_source *s, int64_t offset, int64_t length, struct iovec *iov, int n_iov,
                   fl_failure *failure)
{
    if (s->mode == FL_MMAP) {
        if (length > s->size - offset)
            return fail(failure, FL_FAIL_END, 0, s->size);
        return read_map(s, offset, length, iov, n_iov, failure);
    }
    const int64_t got = fill(s, offset, length, iov, n_iov, failure);
    if (got < 0)
        return failure->kind;
    return got == length ? FL_READ_OK : fail(failure, FL_FAIL_END, 0, offset + got);
}

static int copy_direct(fl_source *s, int64_t offset, int64_t length, uint8_t *out,
                       fl_failure *failure)
{
    const int64_t a = s->alignment;
    void *bounce = NULL;
    int kind = FL_READ_OK;

    if (posix_memalign(&bounce, (size_t)(a > s->os_page ? a : s->os_page), BOUNCE_BYTES))
        return fail(failure, FL_FAIL_READ, ENOMEM, offset);
    for (int64_t done = 0; done < length && kind == FL_READ_OK;) {
        const int64_t start = (offset + done) / a * a, lead = offset + done - start;
        int64_t want = length - done;
        if (want > BOUNCE_BYTES - lead)
            want = BOUNCE_BYTES - lead;
        struct iovec iov = {bounce, (size_t)((lead + want + a - 1) / a * a)};
        const int64_t got = fill(s, start, (int64_t)iov.iov_len, &iov, 1, failure);
        if (got < 0) {
            kind = failure->kind;
        } else if (got < lead + want) {
            kind = fail(failure, FL_FAIL_END, 0, start + got);
        } else {
            memcpy(out + done, (uint8_t *)bounce + lead, (size_t)want);
            done += want;
        }
    }
    free(bounce);
    return kind;
}

int fl_source_copy(fl_source *s, int64_t offset, int64_t length, uint8_t *out,
                   fl_failure *failure)
{
    int kind = FL_READ_OK;

    if (length == 0)
        return FL_READ_OK;
    if (s->mode == FL_DIRECT)
        return copy_direct(s, offset, length, out, failure);
    /* Block by block: a section may be as long as the budget. */
    for (int64_t done = 0; done < length && kind == FL_READ_OK;) {
        const int64_t at = offset + done, in_block = FL_BLOCK_BYTES - at % FL_BLOCK_BYTES;
        struct iovec iov = {out + done, (size_t)(in_block < length - done ? in_block : length - done)};
        const int64_t n = (int64_t)iov.iov_len;
        fl_source_begin(s, at, n);
        if (!fl_source_in_blocks(s, n))
            fl_source_ahead(s, at, n);
        kind = fl_source_read(s, at, n, &iov, 1, failure);
        fl_source_end(s, at, n, FL_LEAVE_NOTHING);
        done += n;
    }
    return kind;
}

int fl_source_in_blocks(const fl_source *s, int64_t length)
{
    return s->blocks && length >= IN_BLOCKS_FROM && fl_blocks_work(s->blocks);
}

void fl_source_ahead(fl_source *s, int64_t offset, int64_t length)
{
    if (s->mode != FL_MMAP || offset >= s->size || length <= 0)
        return;
    const int64_t start = offset / s->os_page * s->os_page;
    const int64_t stop = length > s->size - offset ? s->size : offset + length;
    madvise(s->map + start, (size_t)(stop - start), MADV_WILLNEED);
}

/* Out of the page tables of the small extents' mapping.  A fault maps neighbours that are cached
 * already, up to a whole block of them: in a file that somebody holds in memory they would stay
 * mapped, and be ours, until the file is. */
static void unmap(fl_source *s, int64_t start, int64_t stop)
{
    const int64_t end = (s->size + s->os_page - 1) / s->os_page * s->os_page;

    start = start / FL_BLOCK_BYTES * FL_BLOCK_BYTES;
    stop = (stop + FL_BLOCK_BYTES - 1) / FL_BLOCK_BYTES * FL_BLOCK_BYTES;
    if (start < end)
        madvise(s->map + start, (size_t)((stop < end ? stop : end) - start), MADV_DONTNEED);
}

void fl_source_begin(fl_source *s, int64_t offset, int64_t length)
{
    if (s->blocks && fl_source_in_blocks(s, length))
        fl_blocks_begin(s->blocks, offset, length);
    else if (s->blocks)
        fl_blocks_elsewhere(s->blocks, fl_blocks_spanned(offset, length));
}

void fl_source_end(fl_source *s, int64_t offset, int64_t length, int leaves)
{
    const int64_t page = s->os_page, start = offset / page * page;
    int64_t stop = offset + length;

    if (s->mode == FL_DIRECT)
        return;
    if (fl_source_in_blocks(s, length)) {
        fl_blocks_end(s->blocks, offset, length, !(leaves & FL_LEAVE_BLOCKS));
        return;
    }
    /* The page tables first: the page cache keeps whatever is still mapped. */
    if (s->mode == FL_MMAP)
        unmap(s, start, stop);
    if (s->blocks)
        fl_blocks_elsewhere(s->blocks, -fl_blocks_spanned(offset, length));
    stop = leaves & FL_LEAVE_LAST_PAGE ? stop / page * page : (stop + page - 1) / page * page;
    if (stop > start)
        posix_fadvise(s->fd, start, stop - start, POSIX_FADV_DONTNEED);
}

void fl_direct_alignment(int fd, int64_t *alignment, int64_t *memory_alignment)
{
    *alignment = *memory_alignment = -1;
#ifdef STATX_DIOALIGN
    struct statx found;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found) == 0 &&
        (found.stx_mask & STATX_DIOALIGN)) {
        *alignment = found.stx_dio_offset_align;
        *memory_alignment = found.stx_dio_mem_align;
    }
#endif
}

int64_t fl_resident_bytes(int fd, int64_t offset, int64_t length)
{
    const int64_t page = sysconf(_SC_PAGESIZE), start = offset / page * page;
    const size_t n_bytes = (size_t)(offset + length - start);
    const size_t n_pages = (n_bytes + (size_t)page - 1) / (size_t)page;
    int64_t resident = -1;
    unsigned char *state = NULL;
    void *map;

    if (n_pages == 0)
        return 0;
    map = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, start);
    if (map == MAP_FAILED)
        return -1;
    state = malloc(n_pages);
    if (state && mincore(map, n_bytes, state) == 0) {
        resident = 0;
        for (size_t i = 0; i < n_pages; i++)
            resident += state[i] & 1 ? page : 0;
    }
    free(state);
    munmap(map, n_bytes);
    return resident;
}
