"""`mmap`: one mapping of the whole file, advised ahead, copied from, dropped behind.

A fair portable second to `direct`: the kernel is told of about 32 extents ahead, reader threads
copy, and the pages are released at once, so that resident memory does not grow with what was read.
Extents of half a MiB and more go through a second mapping, which the kernel fills in blocks of
2 MiB (ext/fl_blocks.h).  Every access runs under a guard that turns a vanished page into an error.
"""

from __future__ import annotations

from .. import _core
from ..units import MIB
from .native import NativeStorage

# AHEAD_BYTES of ext/fl_reader.c: advised, and not yet begun.
AHEAD_BYTES = 8 * MIB
# A few threads copy: reads are in flight by advice, or a block at a time.  Measured with extents of
# 1 MiB: 4 threads 1.0 GB/s where 16 got 0.4, because neighbours in a block came too far apart.
MOST_THREADS = 4
# Of ext/fl_blocks.h: so many are open at once, or what the threads' extents span if that is more.
BLOCK_BYTES, MOST_BLOCKS = 2 * MIB, 8


class MmapStorage(NativeStorage):
    """Any alignment, any regular file; takes address space of the file's size."""

    name = "mmap"
    mode = _core.READ_MMAP
    most_threads = MOST_THREADS

    @classmethod
    def cached_bytes(cls, depth: int, largest_extent: int) -> int:
        # In a file that was cached before, a fault maps a whole block of small extents too.
        spanned = min(depth, MOST_THREADS) * (-(-(largest_extent - 1) // BLOCK_BYTES) + 1)
        return max(MOST_BLOCKS, spanned) * BLOCK_BYTES + max(AHEAD_BYTES, largest_extent)
