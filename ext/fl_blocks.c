/* See fl_blocks.h. */
#include "fl_blocks.h"

#include "fl_guard.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Below it a probe has no block to try. */
enum { LEAST_BYTES = 2 * FL_BLOCK_BYTES };

enum { UNTRIED = 0, WORKS = 1, FAILS = 2 };

typedef struct {
    uint32_t used;  /* bytes of it, since it was last dropped */
    uint32_t users; /* threads that copy from it now */
} block_state;

struct fl_blocks {
    uint8_t *map;
    int64_t size;
    int fd, slot, state;
    pthread_mutex_t lock; /* everything below, and state; dropping too, or others would open more */
    int n_active;         /* with users, and those elsewhere */
    int n_kept;
    int64_t kept[FL_BLOCK_MOST]; /* used in part, without users; the oldest first */
    block_state blocks[];
};

fl_blocks *fl_blocks_open(int fd, int64_t size)
{
#ifdef MADV_HUGEPAGE
    const int64_t n_blocks = (size + FL_BLOCK_BYTES - 1) / FL_BLOCK_BYTES;
    if (size < LEAST_BYTES)
        return NULL;
    fl_blocks *b = calloc(1, sizeof *b + (size_t)n_blocks * sizeof b->blocks[0]);
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
    for (int i = 0; i < b->n_kept; i++)
        drop(b, b->kept[i]);
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

/* Under the lock, as all below. */
static void forget_kept(fl_blocks *b, int i)
{
    b->n_kept--;
    memmove(b->kept + i, b->kept + i + 1, (size_t)(b->n_kept - i) * sizeof b->kept[0]);
}

static void make_room(fl_blocks *b, int n_more)
{
    while (b->n_kept && b->n_active + b->n_kept + n_more > FL_BLOCK_MOST) {
        const int64_t oldest = b->kept[0];
        forget_kept(b, 0);
        b->blocks[oldest].used = 0;
        drop(b, oldest);
    }
}

static void enter(fl_blocks *b, int64_t block)
{
    if (b->blocks[block].users++ > 0)
        return;
    for (int i = 0; i < b->n_kept; i++)
        if (b->kept[i] == block)
            forget_kept(b, i);
    make_room(b, 1);
    b->n_active++;
}

static void leave(fl_blocks *b, int64_t block, uint32_t n_used)
{
    block_state *s = &b->blocks[block];
    const uint32_t whole = (uint32_t)(end_of(b, block) - block * FL_BLOCK_BYTES);

    s->used = n_used < whole - s->used ? s->used + n_used : whole;
    if (--s->users > 0)
        return;
    b->n_active--;
    if (s->used == whole) {
        s->used = 0;
        drop(b, block);
    } else {
        make_room(b, 1);
        b->kept[b->n_kept++] = block;
    }
}

int fl_blocks_spanned(int64_t offset, int64_t length)
{
    return (int)((offset + length - 1) / FL_BLOCK_BYTES - offset / FL_BLOCK_BYTES) + 1;
}

void fl_blocks_elsewhere(fl_blocks *b, int n_more)
{
    pthread_mutex_lock(&b->lock);
    if (n_more > 0)
        make_room(b, n_more);
    b->n_active += n_more;
    pthread_mutex_unlock(&b->lock);
}

void fl_blocks_begin(fl_blocks *b, int64_t offset, int64_t length)
{
    const int64_t stop = offset + length < b->size ? offset + length : b->size;

    pthread_mutex_lock(&b->lock);
    for (; offset < stop; offset = end_of(b, offset / FL_BLOCK_BYTES))
        enter(b, offset / FL_BLOCK_BYTES);
    pthread_mutex_unlock(&b->lock);
}

void fl_blocks_end(fl_blocks *b, int64_t offset, int64_t length, int all)
{
    const int64_t stop = offset + length < b->size ? offset + length : b->size;

    pthread_mutex_lock(&b->lock);
    while (offset < stop) {
        const int64_t block = offset / FL_BLOCK_BYTES, end = end_of(b, block);
        const int64_t n = (end < stop ? end : stop) - offset;
        leave(b, block, all ? FL_BLOCK_BYTES : (uint32_t)n);
        offset += n;
    }
    pthread_mutex_unlock(&b->lock);
}
