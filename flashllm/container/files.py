"""Plain, careful file access for the parts of a container that are read whole.

Every read is exactly as long as asked or a FlashReadError.  Frames are not read here but by the
storage room.
"""

from __future__ import annotations

import errno
import os

from ..errors import FlashReadError


def read_into(fd: int, path: object, offset: int, out: memoryview, where: str) -> None:
    """Fill `out` from `offset` on, or FlashReadError."""
    done = 0
    while done < len(out):
        try:
            n = os.preadv(fd, [out[done:]], offset + done)
        except OSError as error:
            place = offset + done
            raise FlashReadError(error.errno or 0, error.strerror, path, place, where) from error
        if n == 0:
            why = f"the file ends {len(out) - done} bytes early"
            raise FlashReadError(errno.EIO, why, path, offset + done, where)
        done += n


def read_exactly(fd: int, path: object, offset: int, n_bytes: int, where: str) -> bytes:
    """`n_bytes` from `offset` on.  The caller has held `n_bytes` against the file's size."""
    raw = bytearray(n_bytes)
    read_into(fd, path, offset, memoryview(raw), where)
    return bytes(raw)


def write_all(fd: int, offset: int, data: memoryview) -> None:
    """All of `data` at `offset`; the system's OSError otherwise."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def expect_no_readahead(fd: int) -> None:
    """Read only what is asked: read-ahead of 8 MiB has been seen, and is charged to us."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def drop_page_cache(fd: int, offset: int, n_bytes: int) -> None:
    """Give back the page cache of a range that is not read again; advice, never an error."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
