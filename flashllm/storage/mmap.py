"""`mmap`: one mapping of the whole file, advised ahead, copied from, dropped behind.

A fair portable second to `direct`: the kernel is told of about 32 extents ahead, reader threads
copy, and the pages are released at once, so that resident memory does not grow with what was read.
Extents of half a MiB and more go through a second mapping, which the kernel fills in blocks of
2 MiB (ext/fl_blocks.h).  Every access runs under a guard that turns a vanished page into an error.
"""

from __future__ import annotations

from .. import _core
from ..units import KIB, MIB
from .native import NativeStorage

# AHEAD_BYTES of ext/fl_reader.c: advised, and not yet begun.
AHEAD_BYTES = 8 * MIB
# A few threads copy: reads are in flight by advice, or a block at a time.  Measured with extents of
# 1 MiB: 4 threads 1.0 GB/s where 16 got 0.4, because neighbours in a block came too far apart.
MOST_THREADS = 4
# Of ext/fl_blocks.h: a block for every thread (neighbours share them), four used in part.
BLOCK_BYTES = (MOST_THREADS + 4) * 2 * MIB
LEAST_IN_BLOCKS = 512 * KIB


class MmapStorage(NativeStorage):
    """Any alignment, any regular file; takes address space of the file's size."""

    name = "mmap"
    mode = _core.READ_MMAP
    most_threads = MOST_THREADS

    @classmethod
    def cached_bytes(cls, depth: int, largest_extent: int) -> int:
        copied = super().cached_bytes(min(depth, MOST_THREADS), largest_extent)
        if largest_extent >= LEAST_IN_BLOCKS:
            copied = max(copied, BLOCK_BYTES)
        return copied + max(AHEAD_BYTES, largest_extent)
