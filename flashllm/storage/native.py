"""Storage over the compiled reader: opens the file safely and words what goes wrong.

The three backends differ in how the descriptor is prepared and in the reader's mode; everything
else they share is here, and the I/O engine too, who waits for the device: `threads`, as many as
reads are in flight, in a blocking call each; or `uring`, one thread that drives a ring of the
kernel's asynchronous reads (io_uring).  That is for `direct` only: buffered ones would block kernel
workers instead.
"""

from __future__ import annotations

import errno
import mmap
import os

from .. import _core
from ..errors import (
    ChecksumError,
    ClosedError,
    FlashReadError,
    UnknownNameError,
    UnsupportedError,
    UsageError,
)
from ..regular import open_regular
from .base import READ_LIMIT, Describe, ReadBatch, Storage, Ticket

ENGINES = ("threads", "uring")
# Reads in flight unless asked otherwise.  In a ring one more costs nothing but a few hundred bytes:
# 8 KiB each, 64 at once are served at 54,000 a second, 16 at 46,000.
THREADS, RING_DEPTH = 16, 64


def _open(path: str | os.PathLike) -> tuple[str, int, int]:
    """(path, descriptor, size) of a regular file; see regular.py.  UsageError for what is no path
    at all."""
    try:
        path = os.fsdecode(path)
        fd = open_regular(path)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path!r} is not a path: {error}") from error
    return path, fd, os.fstat(fd).st_size


class NativeTicket(Ticket):
    def __init__(self, native: _core.NativeTicket, storage: NativeStorage, describe):
        self._native, self._storage, self._describe = native, storage, describe

    def wait(self, upto: int | None = None) -> None:
        n = self._native.n
        if upto is None:
            upto = n
        elif not 0 <= upto <= n:
            raise UsageError(f"wait for {upto} extents of a batch of {n}")
        try:
            self._native.wait(upto)
        except _core.ReadFailure as failure:
            raise self._storage.worded(failure, self._describe) from None

    def done(self) -> int:
        n = self._native.done()
        if n < 0:
            raise self._storage._forked()
        return n

    def close(self) -> None:
        self._native.close()


class NativeStorage(Storage):
    """The shared body of `direct`, `pread` and `mmap`."""

    mode: int
    most_threads = 256

    def __init__(
        self, path: str | os.PathLike, *, depth: int | None = None, engine: str = "threads"
    ):
        if engine not in ENGINES:
            raise UnknownNameError("io_engine", engine, list(ENGINES))
        if depth is not None and (not isinstance(depth, int) or not 1 <= depth <= 256):
            raise UsageError(f"depth is the number of reads in flight, 1 to 256, not {depth!r}")
        n_threads = min(depth or THREADS, self.most_threads)
        self.path, fd, self.size = _open(path)
        try:
            self.alignment, self.memory_alignment = self._prepare(fd)
            if engine == "uring" and self.mode != _core.READ_DIRECT:
                raise self._no_ring(f"storage {self.name} does not read past the page cache")
            self._reader = _core.Reader(
                fd, self.mode, self.size, n_threads, self.alignment, self.memory_alignment,
                (depth or RING_DEPTH) if engine == "uring" else 0,
            )  # fmt: skip
        except OSError as error:
            os.close(fd)
            if isinstance(error, FlashReadError):
                raise
            strerror = os.strerror(error.errno)
            raise FlashReadError(error.errno, strerror, self.path, 0, "open") from error
        except BaseException:
            os.close(fd)
            raise
        self._fd: int | None = fd
        self.engine = engine
        if engine == "uring" and self._reader.ring_error:
            self.close()
            raise self._no_ring(os.strerror(self._reader.ring_error))

    def _no_ring(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: io_engine uring: {why}")

    def _prepare(self, fd: int) -> tuple[int, int]:
        """Make the descriptor ready; (alignment, memory alignment)."""
        os.set_blocking(fd, True)
        return 1, 1

    def submit(
        self, batch: ReadBatch, describe: Describe | None = None, *, ahead: bool = False
    ) -> Ticket:
        try:
            native = self._reader.submit(*batch.arrays(), ahead)
        except _core.ReadFailure as failure:
            raise self.worded(failure, describe) from None
        except (ValueError, TypeError) as error:
            batch.validate()
            raise UsageError(f"not a batch: {error}") from error
        return NativeTicket(native, self, describe)

    def submit_runs(self, tables, runs, first, stages):
        try:
            return self._reader.submit_runs(tables, runs, first, stages)
        except _core.ReadFailure as failure:
            raise self.worded(failure, None) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"not runs of frames: {error}") from error

    def submit_frames(
        self, extents, start, stop, tables, targets, *, room=0, room_bytes=0, step=0, trash,
        describe=None, ahead=False,
    ):  # fmt: skip
        try:
            native = self._reader.submit_frames(
                tables, start, stop, extents.first, extents.offset, extents.length,
                extents.frames, targets, room, room_bytes, step, trash, ahead,
            )  # fmt: skip
        except _core.ReadFailure as failure:
            raise self.worded(failure, describe) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"not frames of a plane: {error}") from error
        return NativeTicket(native, self, describe)

    @property
    def submit_ns(self) -> int:
        return self._reader.submit_ns

    brings = True

    def bring(self, request, *, halves, half_bytes, step, trash, describe):
        try:
            return _core.Bring(self._reader, request, *halves, half_bytes, step, trash)
        except _core.ReadFailure as failure:
            raise self.worded(failure, describe) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"not a request that can be brought: {error}") from error

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or not 0 <= length <= READ_LIMIT or offset > 2**62:
            raise UsageError(f"cannot read {length} bytes at offset {offset} in one go")
        if self._fd is not None and offset + length > self.size:
            # Before anything is allocated: the length may come from a hostile header.
            raise self._end(offset, self.size, "")
        try:
            return self._reader.read(offset, length)
        except _core.ReadFailure as failure:
            raise self.worded(failure, None) from None

    def stats(self) -> dict[str, int]:
        names = ("bytes_read", "n_reads", "n_retries", "read_ns")
        return dict(zip(names, self._reader.stats(), strict=True))

    @classmethod
    def cached_bytes(cls, depth: int, largest_extent: int) -> int:
        """Buffered, every thread's extent is there while it is being copied."""
        return depth * (largest_extent + 2 * mmap.PAGESIZE)

    def fileno(self) -> int:
        if self._fd is None:
            raise ClosedError(f"{self.path}: the storage is closed")
        return self._fd

    def close(self) -> None:
        self._fd = None
        self._reader.close()

    def _forked(self) -> ClosedError:
        return ClosedError(
            f"{self.path}: opened before a fork; reading threads do not follow into the child, "
            "open the file there"
        )

    def _end(self, offset: int, size: int, where: str) -> FlashReadError:
        strerror = f"the file ends at {size}, before the bytes that are wanted"
        return FlashReadError(errno.ENODATA, strerror, self.path, offset, where)

    def worded(self, failure: _core.ReadFailure, describe: Describe | None) -> Exception:
        where = ""
        if failure.kind in ("read", "end", "check") and failure.extent >= 0:
            check = failure.check if failure.kind == "check" else -1
            where = f"extent {failure.extent}" + (f", check {check}" if check >= 0 else "")
            if describe is not None:
                where = describe(failure.extent, check)
        match failure.kind:
            case "read":
                strerror = os.strerror(failure.error)
                return FlashReadError(failure.error, strerror, self.path, failure.offset, where)
            case "end":
                return self._end(failure.offset, failure.offset, where)
            case "check":
                where = f"{where} at offset {failure.offset}"
                return ChecksumError(self.path, where, failure.expected, failure.found)
            case "closed":
                return ClosedError(f"{self.path}: the storage or the batch was closed")
            case "forked":
                return self._forked()
            case "system":
                strerror = os.strerror(failure.error)
                return FlashReadError(failure.error, strerror, self.path, 0, "submit")
        assert failure.kind == "refused", failure.kind
        aligned = f" (alignment {self.alignment})" if self.alignment > 1 else ""
        return UsageError(f"{self.path}: extent {failure.extent}: {failure.reason}{aligned}")
