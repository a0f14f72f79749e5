/* XXH64 as published in the xxHash specification (xxhash_spec.md, version 0.1.1).
 * One-shot only: a frame is always whole in memory when it is checked. */
#ifndef FL_XXH64_H
#define FL_XXH64_H

#include <stddef.h>
#include <stdint.h>

uint64_t fl_xxh64(const void *data, size_t n_bytes, uint64_t seed);

/* Whether whole stripes may use AVX-512 (F, DQ, VL) from now on: to be called before there are
 * other threads, with what fl_find_kernel_set found.  Elsewhere than on x86-64 it does nothing. */
void fl_xxh64_use_avx512(int yes);

#endif
