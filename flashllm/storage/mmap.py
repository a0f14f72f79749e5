"""`mmap`: one mapping of the whole file, advised ahead, copied from, dropped behind.

A fair portable second to `direct`: the kernel is told of about 32 extents ahead, reader threads
copy, and the pages are released at once, so that resident memory does not grow with what was read.
Every access runs under a guard that turns a vanished page into an error.
"""

from __future__ import annotations

from .. import _core
from ..units import MIB
from .native import NativeStorage

# AHEAD_BYTES of ext/fl_reader.c: advised, and not yet begun.
AHEAD_BYTES = 8 * MIB


class MmapStorage(NativeStorage):
    """Any alignment, any regular file; takes address space of the file's size."""

    name = "mmap"
    mode = _core.READ_MMAP

    def _cached_bytes(self, largest_extent: int) -> int:
        return super()._cached_bytes(largest_extent) + max(AHEAD_BYTES, largest_extent)
