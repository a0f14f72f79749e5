/* See fl_blocks.h. */
#include "fl_blocks.h"

#include "fl_guard.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Below it a probe has no block to try. */
enum { LEAST_BYTES = 2 * FL_BLOCK_BYTES };

enum { UNTRIED = 0, WORKS = 1, FAILS = 2 };

struct fl_blocks {
    uint8_t *map;
    int64_t size;
    int fd, slot, state;
    pthread_mutex_t lock; /* everything below, and state */
    int64_t leftovers[FL_BLOCK_LEFTOVERS]; /* blocks used in part, a ring; -1 where there is none */
    int oldest;
    uint32_t used[]; /* bytes of each block */
};

fl_blocks *fl_blocks_open(int fd, int64_t size)
{
#ifdef MADV_HUGEPAGE
    const int64_t n_blocks = (size + FL_BLOCK_BYTES - 1) / FL_BLOCK_BYTES;
    if (size < LEAST_BYTES)
        return NULL;
    fl_blocks *b = calloc(1, sizeof *b + (size_t)n_blocks * sizeof b->used[0]);
    if (!b)
        return NULL;
    b->fd = fd;
    b->size = size;
    b->map = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
    if (b->map == MAP_FAILED) {
        free(b);
        return NULL;
    }
    /* One block a fault, and none ahead of it. */
    const int refused = madvise(b->map, (size_t)size, MADV_RANDOM) ||
                        madvise(b->map, (size_t)size, MADV_HUGEPAGE);
    b->slot = refused ? -1 : fl_guard_watch(b->map, (size_t)size);
    if (b->slot < 0) {
        munmap(b->map, (size_t)size);
        free(b);
        return NULL;
    }
    for (int i = 0; i < FL_BLOCK_LEFTOVERS; i++)
        b->leftovers[i] = -1;
    pthread_mutex_init(&b->lock, NULL);
    return b;
#else
    return NULL;
#endif
}

static int64_t end_of(const fl_blocks *b, int64_t block)
{
    const int64_t end = (block + 1) * FL_BLOCK_BYTES;
    return end < b->size ? end : b->size;
}

static void drop(const fl_blocks *b, int64_t block)
{
    const int64_t start = block * FL_BLOCK_BYTES;
    /* The page tables first: the page cache keeps whatever is still mapped. */
    madvise(b->map + start, (size_t)(end_of(b, block) - start), MADV_DONTNEED);
    posix_fadvise(b->fd, start, FL_BLOCK_BYTES, POSIX_FADV_DONTNEED);
}

void fl_blocks_close(fl_blocks *b)
{
    if (!b)
        return;
    /* Nobody reads now.  Without the lock: in a forked child it may be held by a thread that is not
     * there. */
    for (int i = 0; i < FL_BLOCK_LEFTOVERS; i++)
        if (b->leftovers[i] >= 0)
            drop(b, b->leftovers[i]);
    fl_guard_forget(b->slot);
    munmap(b->map, (size_t)b->size);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

static int resident(const fl_blocks *b, int64_t offset)
{
    unsigned char state = 0;
    return mincore(b->map + offset, 1, &state) == 0 && (state & 1);
}

static int arrive_whole(const fl_blocks *b)
{
    const int64_t block = b->size / FL_BLOCK_BYTES - 1, start = block * FL_BLOCK_BYTES;
    uint8_t byte;

    drop(b, block);
    if (resident(b, start + FL_BLOCK_BYTES / 2))
        return WORKS; /* somebody else holds it: this file is in memory */
    const int faulted = fl_guard_copy(&byte, b->map + start, 1) != NULL;
    const int whole = resident(b, start + FL_BLOCK_BYTES / 2);
    drop(b, block);
    return !faulted && whole ? WORKS : FAILS;
}

int fl_blocks_work(fl_blocks *b)
{
    if (!b)
        return 0;
    pthread_mutex_lock(&b->lock);
    if (b->state == UNTRIED)
        b->state = arrive_whole(b);
    const int works = b->state == WORKS;
    pthread_mutex_unlock(&b->lock);
    return works;
}

const uint8_t *fl_blocks_base(const fl_blocks *b)
{
    return b->map;
}

/* Under the lock: the block that gives way to `block`, or -1. */
static int64_t keep(fl_blocks *b, int64_t block)
{
    const int64_t before = b->leftovers[b->oldest];
    b->leftovers[b->oldest] = block;
    b->oldest = (b->oldest + 1) % FL_BLOCK_LEFTOVERS;
    if (before < 0 || b->used[before] == 0)
        return -1;
    b->used[before] = 0;
    return before;
}

void fl_blocks_used(fl_blocks *b, int64_t offset, int64_t length, int all)
{
    const int64_t stop = offset + length < b->size ? offset + length : b->size;

    while (offset < stop) {
        const int64_t block = offset / FL_BLOCK_BYTES, end = end_of(b, block);
        const int64_t n = (end < stop ? end : stop) - offset, start = block * FL_BLOCK_BYTES;
        int64_t gone = -1;

        pthread_mutex_lock(&b->lock);
        const int is_new = b->used[block] == 0;
        b->used[block] += (uint32_t)n;
        if (all || b->used[block] >= end - start) {
            b->used[block] = 0;
            gone = block;
        } else if (is_new) {
            gone = keep(b, block);
        }
        pthread_mutex_unlock(&b->lock);
        if (gone >= 0)
            drop(b, gone);
        offset += n;
    }
}
