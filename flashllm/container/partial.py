"""The file that is being written: locked, appended to in batches, and never trusted after a failed
sync.

Memory: one batch.  Page cache: SYNC_BYTES, because dirty pages are charged to us until they are on
the disk and dropped.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..durable import partial_path, sync_directory
from ..errors import BusyError, ConversionError
from ..regular import drop_page_cache
from ..units import MIB, format_size
from .base import SECTION_ALIGNMENT

BATCH_BYTES = MIB
SYNC_BYTES = 64 * MIB


class PartialFile:
    """`NAME.partial` beside the `final` file.  One thread.

    `end` is where the next byte goes, counting what still waits in the batch.  `on_gone` is called
    when nothing has the partial name any more: removed, or renamed.  The system's errors come as
    ConversionError; BusyError if another process has the file.
    """

    def __init__(self, final: Path, *, on_gone: Callable[[], None]):
        self.final, self._on_gone = final, on_gone
        self.path = partial_path(final)
        self.end = self._synced = SECTION_ALIGNMENT
        self._batch = bytearray()
        self._fd: int | None = None
        with self.reported():
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            self._fd = os.open(self.path, flags, 0o644)
            self._lock()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise BusyError(f"{self.path}: another process is writing it") from error

    @property
    def is_open(self) -> bool:
        return self._fd is not None

    def fileno(self) -> int:
        return self._fd

    def check_space(self, estimate_bytes: int) -> None:
        """ConversionError if a file of `estimate_bytes` does not fit on the disk."""
        needed, free = estimate_bytes - self.end, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ConversionError(
                f"{self.final}: about {format_size(needed)} are needed on this disk, "
                f"{format_size(free)} are free"
            )

    def cut(self, end: int) -> None:
        """Drop everything from `end` on.  The batch must be empty."""
        assert not self._batch
        self.end = end
        self._synced = min(self._synced, end)
        with self.reported():
            os.ftruncate(self._fd, end)

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Append zeros up to `offset`, then `data`."""
        self._batch += bytes(offset - self.end)
        self._batch += data
        self.end = offset + len(data)
        if len(self._batch) >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        with self.reported():
            write_all(self._fd, self.end - len(self._batch), memoryview(self._batch))
        self._batch = bytearray()
        if self.end - self._synced >= SYNC_BYTES:
            self.sync(getattr(os, "fdatasync", os.fsync))

    def overwrite(self, offset: int, data: bytes) -> None:
        """Write into what is there already."""
        with self.reported():
            write_all(self._fd, offset, memoryview(data))

    def sync(self, call: Callable[[int], None]) -> None:
        """`call` (os.fsync or os.fdatasync) the file.  If that fails the file is removed: the
        kernel may have dropped the pages that it could not write, so nothing in it can be trusted,
        and asking again would succeed without cause."""
        try:
            call(self._fd)
        except OSError as error:
            self.remove()
            raise ConversionError(f"{self.final}: sync failed: {error.strerror}") from error
        drop_page_cache(self._fd, self._synced, self.end - self._synced)
        self._synced = self.end

    def rename(self) -> None:
        """Give the synced file its final name, read-only, and make that durable; then close."""
        with self.reported():
            os.replace(self.path, self.final)
            # Finished containers are never modified.
            os.fchmod(self._fd, stat.S_IMODE(os.fstat(self._fd).st_mode) & 0o444)
        self._on_gone()
        self.close()
        try:
            sync_directory(self.final.parent)
        except OSError as error:
            self.final.unlink()
            raise ConversionError(f"{self.final}: sync of its directory: {error}") from error

    def remove(self) -> None:
        """Give up.  Nothing if the file was closed, and is no longer ours."""
        if self.is_open:
            self.path.unlink(missing_ok=True)
            self._on_gone()
        self.close()

    def close(self) -> None:
        """Let go of the file; what was written stays.  Doing so again is nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turns the system's errors while writing into ConversionError."""
        try:
            yield
        except OSError as error:
            kept = f"; {self.path} is kept: run again to go on, or delete it"
            if not os.path.lexists(self.path):  # it could not even be made
                kept = ""
            why = error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why = f"the disk is full at {format_size(self.end)}"
            raise ConversionError(f"{self.final}: {why}{kept}") from error


def write_all(fd: int, offset: int, data: memoryview) -> None:
    """All of `data` at `offset`; the system's OSError otherwise."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
