/* A small pool of native threads: run(fn, context, n_parts) calls fn(context, part) for each part
 * once, the calling thread taking its share, and returns when all are done.  Which thread does
 * which part is left open: parts write disjoint outputs, so no result depends on it.
 *
 * Workers wait for work with a short spin, then park.  Calls from several threads queue on a lock.
 * After a fork the child has no workers: a pool notices and runs everything on the caller.
 */
#ifndef FL_POOL_H
#define FL_POOL_H

#include <stdint.h>

typedef struct fl_pool fl_pool;
typedef void (*fl_part_fn)(void *context, int part);

/* n_threads counts the caller: 1 makes no worker.  NULL when memory or threads run out. */
fl_pool *fl_pool_create(int n_threads);
void fl_pool_destroy(fl_pool *pool);
int fl_pool_n_threads(const fl_pool *pool);
/* n_parts <= FL_POOL_MAX_PARTS. */
void fl_pool_run(fl_pool *pool, fl_part_fn fn, void *context, int n_parts);

/* A moment of waiting for another thread. */
static inline void fl_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum { FL_POOL_MAX_PARTS = 65535, FL_POOL_MAX_THREADS = 256 };

#endif
