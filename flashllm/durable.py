"""Files that appear whole or not at all: written under another name, on the disk before they get
their own."""

from __future__ import annotations

import os
from pathlib import Path


def partial_path(final: Path) -> Path:
    """The name that a file has while it is written."""
    return final.with_name(final.name + ".partial")


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
    as it was.  Errors are the system's.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._partial = partial_path(self.path)
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
