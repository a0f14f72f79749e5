"""Careful reading of regular files, and of nothing else that may lie at their paths.

Opening never waits; every read is exactly as long as asked or a FlashReadError; the page cache is
left as it was found.  Weights are not read here but by the storage room.
"""

from __future__ import annotations

import errno
import os
import stat

from .errors import FlashReadError, FormatError, UsageError

# Not there on every system.  Without O_NONBLOCK opening a FIFO without a writer, or some devices,
# would block; without O_CLOEXEC children would inherit the descriptor.
_FLAGS = os.O_RDONLY
for _name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike) -> int:
    """A descriptor of the regular file at `path`; FormatError for anything that is not one.

    Never waits, whatever lies there.  The system's own errors (missing, dangling or looping link,
    no permission) come as FlashReadError, what cannot be a path at all as UsageError.
    """
    try:
        fd = os.open(path, _FLAGS)
    except ValueError as error:  # a NUL, or letters that the file system's encoding lacks
        raise UsageError(f"{os.fspath(path)!r} is no path: {error}") from None
    except OSError as error:
        # A socket or a device without a driver cannot even be opened.
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR):
            raise FormatError(path, "file", "a regular file", error.strerror) from error
        raise FlashReadError(error.errno or 0, error.strerror, path, 0, "open") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise FormatError(path, "file", "a regular file", _KINDS.get(stat.S_IFMT(mode), "another"))
    return fd


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


def read_small(path: str | os.PathLike, most: int) -> bytes:
    """All of a regular file of at most `most` bytes; FormatError for a larger one, and otherwise
    as `open_regular`."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise FormatError(path, "file size", f"at most {most} bytes", size)
        return read_exactly(fd, path, 0, size, "file")
    finally:
        os.close(fd)


def expect_no_readahead(fd: int) -> None:
    """Read only what is asked: read-ahead of 8 MiB has been seen, and is charged to us."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def drop_page_cache(fd: int, offset: int, n_bytes: int) -> None:
    """Give back the page cache of a range that is not read again; advice, never an error."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
