"""Statistics that wait on disk: a file beside the output that has no name and ends with us.

Memory is what fitting lacks at half of a file's size, and what waits is read once or twice.  What
is written leaves the page cache at once, for a memory group charges it to us.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ..errors import ConversionError
from ..regular import drop_page_cache, read_into
from ..units import format_size

FLUSH_BYTES = 2 * 2**20  # written before it is made to leave
SPARE_BYTES = 64 * 2**20  # of the disk, left to others


class Spool:
    """`reserve` extents, then write and read them as arrays."""

    def __init__(self, folder: Path):
        self._path = Path(folder)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self._fd, self.n_bytes = self._file.fileno(), 0
        self._waiting = [0, 0, 0]  # first byte, last byte, bytes written since the last flush

    def reserve(self, n_bytes: int) -> int:
        """The offset of an extent of so many bytes."""
        at, self.n_bytes = self.n_bytes, self.n_bytes + n_bytes
        return at

    def require_room(self) -> None:
        """ConversionError unless the disk has room for what was reserved."""
        free = shutil.disk_usage(self._path).free
        if free < self.n_bytes + SPARE_BYTES:
            raise ConversionError(
                f"{self._path}: statistics need {format_size(self.n_bytes)} on this disk for a "
                f"while, {format_size(free)} are free"
            )

    def write(self, offset: int, values: np.ndarray) -> None:
        raw = memoryview(np.ascontiguousarray(values)).cast("B")
        done = 0
        while done < len(raw):
            done += os.pwrite(self._fd, raw[done:], offset + done)
        first, last, waiting = self._waiting
        first = min(first, offset) if waiting else offset
        self._waiting = [first, max(last, offset + done), waiting + done]
        if self._waiting[2] >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """What was written is on disk and no longer in memory."""
        first, last, _ = self._waiting
        getattr(os, "fdatasync", os.fsync)(self._fd)
        drop_page_cache(self._fd, first, last - first)
        self._waiting = [0, 0, 0]

    def read(self, offset: int, out: np.ndarray) -> np.ndarray:
        """Fill contiguous `out`."""
        if self._waiting[2]:
            self.flush()
        read_into(self._fd, self._path, offset, memoryview(out).cast("B"), "statistics")
        drop_page_cache(self._fd, offset, out.nbytes)
        return out

    def close(self) -> None:
        self._file.close()
