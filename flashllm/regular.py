"""Opening a regular file for reading, and nothing else that may lie at its path."""

from __future__ import annotations

import errno
import os
import stat

from .errors import FlashReadError, FormatError

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
    no permission) come as FlashReadError.
    """
    try:
        fd = os.open(path, _FLAGS)
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
