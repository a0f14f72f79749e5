/* How an operator is divided among threads: outputs are split, never a sum. */
#ifndef FL_PARTS_H
#define FL_PARTS_H

#include "fl_kernels.h"

/* A part should be worth a wake-up (some 5 us): multiply-adds, by the slower vector kernels. */
enum { FL_WORK_PER_PART = 1 << 16 };

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* How many parts for `units` indivisible outputs of `work` each, at most `most` per thread. */
static inline int parts_for(const fl_engine *e, int64_t units, int64_t work, int most)
{
    int64_t threads = fl_pool_n_threads(e->pool);
    if (threads == 1) return 1;
    int64_t worth = units * work / FL_WORK_PER_PART;
    return (int)larger(1, smaller(smaller(units, worth), threads * most));
}

/* Unit boundaries of a part: [units * part / parts, units * (part + 1) / parts). */
static inline int64_t cut(int64_t units, int part, int parts) { return units * part / parts; }

#endif
