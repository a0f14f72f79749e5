/* One open file and how ranges of it reach memory: direct, buffered, or through a mapping.
 *
 * Knows descriptors, offsets and iovecs; no queue, no threads, no Python.  Any number of threads
 * may read one source at once.  Nothing here prints, exits or raises a signal: what goes wrong is
 * described in an fl_failure. */
#ifndef FL_SOURCE_H
#define FL_SOURCE_H

#include "fl_blocks.h"

#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>

enum { FL_DIRECT = 0, FL_PREAD = 1, FL_MMAP = 2 };

enum { FL_READ_OK = 0, FL_FAIL_READ = 1, FL_FAIL_END = 2, FL_FAIL_CHECK = 3 };

typedef struct {
    int kind;          /* FL_FAIL_* */
    int error;         /* errno of FL_FAIL_READ */
    int64_t extent;    /* index in its batch, -1 outside one */
    int64_t check;     /* index in its extent, for FL_FAIL_CHECK */
    int64_t offset;    /* in the file, where it went wrong */
    uint64_t expected, found;
} fl_failure;

typedef struct {
    int fd, mode;
    int64_t size;               /* when it was opened */
    int64_t alignment;          /* of offsets and lengths: FL_DIRECT only, else 1 */
    int64_t memory_alignment;   /* of addresses: FL_DIRECT only, else 1 */
    int64_t os_page;
    uint8_t *map;               /* FL_MMAP: the whole file, or NULL when it is empty */
    int map_slot;
    fl_blocks *blocks;          /* FL_MMAP: the file once more, for large extents; or NULL */
    atomic_uint_fast64_t bytes_read, n_reads, n_retries, read_ns;
} fl_source;

/* Takes no ownership of `fd` until it returns 0; an errno otherwise. */
int fl_source_open(fl_source *s, int fd, int mode, int64_t size, int64_t alignment,
                   int64_t memory_alignment);
void fl_source_close(fl_source *s);

/* Fill the iovecs from [offset, offset + length); they sum to `length` and are left unchanged. */
int fl_source_read(fl_source *s, int64_t offset, int64_t length, struct iovec *iov, int n_iov,
                   fl_failure *failure);

/* A read that was begun at `begun` (fl_source_now) elsewhere, for the counters. */
uint64_t fl_source_now(void);
void fl_source_count(fl_source *s, int64_t n_bytes, uint64_t begun);

/* Any offset and length into `out`, through an aligned bounce buffer where the mode needs one. */
int fl_source_copy(fl_source *s, int64_t offset, int64_t length, uint8_t *out,
                   fl_failure *failure);

/* Whether an extent of `length` bytes goes through blocks: it needs no advice ahead. */
int fl_source_in_blocks(const fl_source *s, int64_t length);

/* The range will be read soon (FL_MMAP). */
void fl_source_ahead(fl_source *s, int64_t offset, int64_t length);

/* Around every fl_source_read: what passes through the page cache or a mapping is bounded before it
 * and given up behind it.  What `leaves` says may stay in the page cache: a last OS page that is the
 * next extent's first as well, a block that has more to give, or nothing. */
enum { FL_LEAVE_NOTHING = 0, FL_LEAVE_BLOCKS = 1, FL_LEAVE_LAST_PAGE = 2 };
void fl_source_begin(fl_source *s, int64_t offset, int64_t length);
void fl_source_end(fl_source *s, int64_t offset, int64_t length, int leaves);

/* What the file system says O_DIRECT needs; 0 and 0 when it says that it has none; -1 unknown. */
void fl_direct_alignment(int fd, int64_t *alignment, int64_t *memory_alignment);

/* Bytes of [offset, offset + length) in the page cache, whole OS pages; -1 and errno on failure. */
int64_t fl_resident_bytes(int fd, int64_t offset, int64_t length);

#endif
