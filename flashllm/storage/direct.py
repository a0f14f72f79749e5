"""`direct`: O_DIRECT, past the page cache, into aligned memory.

The fastest way and the cheapest in CPU time, and the only one that charges a memory limit nothing.
What it needs differs between devices, so it is asked (statx) and then tried with a real aligned
read: file systems exist that accept the flag and refuse the read, or name a wrong alignment.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from .. import _core
from ..errors import FlashReadError, UnsupportedError
from .native import NativeStorage


def _reads_at(fd: int, alignment: int, memory: memoryview) -> bool:
    """Whether one block can be read at the file's start and, where there is one, at its second."""
    for offset in (0, alignment):
        try:
            os.preadv(fd, [memory[:alignment]], offset)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True


class DirectStorage(NativeStorage):
    """Raises UnsupportedError at open where the file system has no O_DIRECT (such as tmpfs)."""

    name = "direct"
    mode = _core.READ_DIRECT

    @classmethod
    def cached_bytes(cls, depth: int, largest_extent: int) -> int:
        return 0

    def _prepare(self, fd: int) -> tuple[int, int]:
        if not hasattr(os, "O_DIRECT"):
            raise UnsupportedError(f"{self.path}: this system has no O_DIRECT")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            raise UnsupportedError(
                f"{self.path}: the file system refuses O_DIRECT ({error.strerror})"
            ) from error
        stated, memory_alignment = _core.direct_alignment(fd)
        if stated == 0:
            raise UnsupportedError(f"{self.path}: the file system says it has no O_DIRECT")
        candidates = [stated] if stated > 0 else [512, 4096]
        try:
            # An anonymous mapping is memory aligned to an OS page.
            page = mmap.mmap(-1, max(*candidates, mmap.PAGESIZE))
            with page, memoryview(page) as memory:
                for alignment in candidates:
                    if _reads_at(fd, alignment, memory):
                        return alignment, memory_alignment if stated > 0 else alignment
        except OSError as error:
            raise FlashReadError(error.errno, error.strerror, self.path, 0, "open") from error
        raise UnsupportedError(
            f"{self.path}: O_DIRECT is accepted, a read of {candidates[-1]} aligned bytes is not"
        )
