/* See fl_pool.h.
 *
 * One 64-bit ticket holds generation (32 bits) | n_parts (16) | next part (16), so that taking a
 * part is one compare-and-swap that cannot mix two jobs: a late worker either takes a part of the
 * job it read or nothing.  fn and context are read after a part was won; the job cannot end, and
 * they cannot change, before that part is done.
 */
#include "fl_pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* Polls before a thread sleeps, 20 us and 340 us.  Waking it takes as long as the shorter wait; the
 * longer one outlasts what the interpreter does between two operators when weights have pushed it
 * out of the cache (1.1 B all in memory: 18.8 -> 20.3 tok/s, medians of seven).  A worker begins with the
 * first, for others may need the processor, and is as patient as has paid of late: where reads are
 * waited for it is not. */
enum { LEAST_SPINS = 600, MOST_SPINS = 10000 };
enum { PAYS_NS = 340000 };
enum { STACK_BYTES = 256 * 1024 };

struct fl_pool {
    _Atomic uint64_t ticket;
    _Atomic int pending;  /* parts not yet done */
    _Atomic int sleepers; /* workers parked or about to */
    _Atomic int stop;
    fl_part_fn fn;
    void *context;
    pthread_mutex_t run_lock; /* one job at a time */
    pthread_mutex_t lock;     /* guards the two conditions */
    pthread_cond_t work, done;
    pid_t owner; /* the process that has the workers */
    int n_workers;
    pthread_t workers[];
};

static int has_parts(uint64_t ticket) { return (ticket & 0xffff) < ((ticket >> 16) & 0xffff); }

/* Take and run parts until none is left. */
static void work_off(fl_pool *pool)
{
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    while (has_parts(ticket)) {
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        pool->fn(pool->context, (int)(ticket & 0xffff));
        if (atomic_fetch_sub_explicit(&pool->pending, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
        ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    }
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Until there is work; returns the ns slept. */
static int64_t sleep_for_work(fl_pool *pool)
{
    const int64_t start = now_ns();
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_parts(atomic_load(&pool->ticket)) && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->work, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
    return now_ns() - start;
}

static void *worker(void *argument)
{
    fl_pool *pool = argument;
    int patience = LEAST_SPINS;
    for (;;) {
        for (int spin = 0; spin < patience && !has_parts(atomic_load(&pool->ticket)) &&
                           !atomic_load(&pool->stop);
             spin++)
            fl_relax();
        if (!has_parts(atomic_load(&pool->ticket)) && !atomic_load(&pool->stop)) {
            patience = sleep_for_work(pool) < PAYS_NS ? 2 * patience : patience / 2;
            if (patience > MOST_SPINS) patience = MOST_SPINS;
            if (patience < LEAST_SPINS) patience = LEAST_SPINS;
        }
        if (atomic_load(&pool->stop)) return NULL;
        work_off(pool);
    }
}

fl_pool *fl_pool_create(int n_threads)
{
    if (n_threads < 1 || n_threads > FL_POOL_MAX_THREADS) return NULL;
    fl_pool *pool = calloc(1, sizeof *pool + (size_t)n_threads * sizeof(pthread_t));
    if (!pool) return NULL;
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->owner = getpid();

    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigset_t all, before; /* signals belong to the interpreter's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    while (pool->n_workers < n_threads - 1 && !failed) {
        failed = pthread_create(&pool->workers[pool->n_workers], &attributes, worker, pool);
        if (!failed) pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed) {
        fl_pool_destroy(pool);
        return NULL;
    }
    return pool;
}

void fl_pool_destroy(fl_pool *pool)
{
    if (!pool) return;
    if (getpid() == pool->owner) {
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->stop, 1);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->n_workers; i++) pthread_join(pool->workers[i], NULL);
        pthread_cond_destroy(&pool->done);
        pthread_cond_destroy(&pool->work);
        pthread_mutex_destroy(&pool->lock);
        pthread_mutex_destroy(&pool->run_lock);
    }
    free(pool);
}

int fl_pool_n_threads(const fl_pool *pool) { return pool ? pool->n_workers + 1 : 1; }

void fl_pool_run(fl_pool *pool, fl_part_fn fn, void *context, int n_parts)
{
    if (!pool || pool->n_workers == 0 || n_parts <= 1 || getpid() != pool->owner) {
        for (int part = 0; part < n_parts; part++) fn(context, part);
        return;
    }
    pthread_mutex_lock(&pool->run_lock);
    pool->fn = fn;
    pool->context = context;
    atomic_store(&pool->pending, n_parts);
    uint64_t generation = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, generation << 32 | (uint64_t)n_parts << 16);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    work_off(pool);
    for (int spin = 0; spin < LEAST_SPINS && atomic_load(&pool->pending) > 0; spin++) fl_relax();
    if (atomic_load(&pool->pending) > 0) {
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->pending) > 0) pthread_cond_wait(&pool->done, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->run_lock);
}
