/* How fast a thread reads memory. */
#ifndef FL_MEMORY_H
#define FL_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* All of these words, or-ed together: reading them is all the work there is. */
uint64_t fl_or_words(const uint64_t *words, size_t n_words);

#endif
