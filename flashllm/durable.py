"""Files that appear whole or not at all: written under another name, on the disk before they get
their own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import UsageError


def partial_path(final: Path) -> Path:
    """The name that a file has while it is written."""
    return final.with_name(final.name + ".partial")


def expect_replaceable(path: str | os.PathLike) -> None:
    """UsageError where something lies at `path` that a file must not take the place of: a renamed
    file would replace a device as well, for everybody."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise UsageError(f"{os.fspath(path)!r} is no path: {error}") from None
    except OSError:  # nothing there; or the error of writing says more
        return
    if stat.S_ISDIR(mode):
        raise UsageError(f"{os.fspath(path)} is a directory")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{os.fspath(path)} is no regular file, and no file takes its place")


def expect_other(path: str | os.PathLike, source: str | os.PathLike, what: str) -> None:
    """UsageError where `path` is the file `source` by whatever name: writing would destroy it."""
    if os.path.exists(path) and os.path.samefile(source, path):
        raise UsageError(f"{os.fspath(path)} is {what}; it would be overwritten")


def sync_directory(path: Path) -> None:
    """Make a rename inside the directory `path` durable; the system's OSError otherwise."""
    if os.name != "posix":
        return  # directories cannot be opened there; the rename itself is journalled
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class WholeFile:
    """A file in the making: write into `file`, then `commit`.

    Leaving the `with`, or `close`, without it leaves nothing behind, and what had the name before
    as it was.  Errors are the system's, and UsageError where no file belongs.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._partial = partial_path(self.path)
        for one in (self.path, self._partial):
            expect_replaceable(one)
        self._done = False
        self.file = open(self._partial, "wb")  # noqa: SIM115 (closed by close)

    def commit(self) -> None:
        """Bring what was written to the disk and give it its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._partial, self.path)
        self._done = True
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Without `commit` before it: nothing is left.  Doing so again is nothing."""
        try:
            self.file.close()
        finally:
            if not self._done:
                self._partial.unlink(missing_ok=True)

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
