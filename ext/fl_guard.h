/* Copying out of a file mapping that may lose its file: SIGBUS becomes a return value.
 *
 * A mapping of a file that shrinks, or whose device fails, delivers SIGBUS at the access, even for
 * pages that were populated before.  One handler for the process, installed when a mapping is
 * registered, again when a copy finds another in its place, and never removed; a fault outside
 * registered mappings goes to the handler that was there before. */
#ifndef FL_GUARD_H
#define FL_GUARD_H

#include <stddef.h>

/* Registers [map, map + n_bytes); the slot for fl_guard_forget, or -1 when there is none left. */
int fl_guard_watch(const void *map, size_t n_bytes);
void fl_guard_forget(int slot);

/* memcpy out of a registered mapping; NULL, or the address in `src` at which it faulted. */
const void *fl_guard_copy(void *dst, const void *src, size_t n_bytes);

#endif
