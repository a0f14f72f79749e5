"""The contract of the storage room: ranges of one file into memory that the caller owns.

Lifetime.   A storage holds one open, regular file from open_storage to close().  A ticket holds a
            place in its queue from submit() to close().  The destinations and the checked ranges of
            a batch are plain addresses: they belong to the caller and must stay valid until
            ticket.close() has returned.  Deleting a ticket closes it.
Order.      All extents of a batch are queued at once.  They are begun in order, first ticket first,
            up to `depth` at a time, and may finish in any order; wait() and done() speak of the
            prefix that has arrived.  Tickets that are read `ahead`, which nobody waits for yet,
            begin when no others have extents left to begin.
Bytes.      An extent arrives whole or fails.  Its checks run over the destinations in memory after
            the read; bytes that do not fit are read once more and then refused.
Failure.    The first failed extent, in the batch's order, is what wait() raises: ChecksumError, or
            FlashReadError for a device error (its errno) and for a file that ends inside the extent
            (ENODATA).  Nothing here ever delivers a signal.  Failed extents do not stop later ones.
Threads.    Every method may be called from any thread of the process that opened the storage.  In a
            forked child everything but close() raises ClosedError: the reading threads stayed
            behind.  Reading needs no interpreter lock.
Caches.     No backend leaves the file in the OS page cache: `direct` never enters it, the others
            drop behind themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._core import Bring, FrameTables, ReadFailure, Request, RunRead
from ..errors import UsageError

# The most that Storage.read returns at once: it is for headers and indices, not for weights.
READ_LIMIT = 1 << 30

# (extent, check) -> what a person calls that place; check is -1 when the whole extent is meant.
Describe = Callable[[int, int], str]

_NO_I64, _NO_U64 = np.empty(0, np.int64), np.empty(0, np.uint64)


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """What to read and where to put it, as arrays; one row per extent, destination or check.

    Extent e reads the file's bytes [offset[e], offset[e] + length[e]) into the destinations
    iov_start[e]..iov_start[e + 1], in their order; their lengths sum to length[e].  When the bytes
    are there, its checks check_start[e]..check_start[e + 1] are made: XXH64 with check_seed over
    check_length bytes at check_address must be check_digest.
    """

    offset: np.ndarray  # int64 [n]
    length: np.ndarray  # int64 [n]
    iov_start: np.ndarray  # int32 [n + 1]
    iov_address: np.ndarray  # uint64 [m]
    iov_length: np.ndarray  # int64 [m]
    check_start: np.ndarray  # int32 [n + 1]
    check_address: np.ndarray  # uint64 [c]
    check_length: np.ndarray  # int64 [c]
    check_seed: np.ndarray  # uint64 [c]
    check_digest: np.ndarray  # uint64 [c]

    @classmethod
    def plain(cls, offset, length, address, *, seed=None, digest=None) -> ReadBatch:
        """One destination per extent; with `seed` and `digest` one check over each, too."""
        offset = np.ascontiguousarray(offset, np.int64)
        length = np.ascontiguousarray(length, np.int64)
        address = np.ascontiguousarray(address, np.uint64)
        starts = np.arange(len(offset) + 1, dtype=np.int32)
        if digest is None:
            checks = (np.zeros_like(starts), _NO_U64, _NO_I64, _NO_U64, _NO_U64)
        else:
            seed, digest = (np.ascontiguousarray(a, np.uint64) for a in (seed, digest))
            checks = (starts, address, length, seed, digest)
        return cls(offset, length, starts, address, length, *checks)

    @classmethod
    def scattered(cls, extents, tables: FrameTables, targets: np.ndarray, trash: int) -> ReadBatch:
        """Frames to `targets`, the gaps between them to `trash`; see Storage.submit_frames."""
        frames, first = extents.frames, extents.first
        offsets, stored, digests = (table[frames] for table in tables.arrays)
        lengths = -(-stored.astype(np.int64) // tables.alignment) * tables.alignment
        m = len(frames)
        address = np.full(2 * m, trash, dtype=np.uint64)
        length = np.zeros(2 * m, dtype=np.int64)
        address[0::2], length[0::2] = targets, lengths
        length[1:-1:2] = np.diff(offsets.astype(np.int64)) - lengths[:-1]
        length[2 * first[1:] - 1] = 0  # what follows an extent's last frame is not read
        # A piece that goes on where the one before ended is the same piece (frames in neighbouring
        # slots): an extent into a run of slots is a single piece.
        keep_at = np.flatnonzero(length > 0)
        starts = np.zeros(2 * m, dtype=bool)
        starts[2 * first[:-1]] = True
        a, n = address[keep_at], length[keep_at]
        head = np.ones(len(keep_at), dtype=bool)
        head[1:] = (a[1:] != a[:-1] + n[:-1].astype(np.uint64)) | starts[keep_at[1:]]
        heads = np.flatnonzero(head)
        iov_start = np.append(np.searchsorted(keep_at[heads], 2 * first[:-1]), len(heads))
        return cls(
            extents.offset, extents.length, iov_start.astype(np.int32), a[heads],
            np.add.reduceat(n, heads), first, targets, stored.astype(np.int64),
            offsets + np.uint64(tables.file_id), digests,  # wraps modulo 2**64, as the format says
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def n_bytes(self) -> int:
        return int(self.length.sum())

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, name) for name in _DTYPES)

    def validate(self) -> None:
        """UsageError unless dtypes, shapes and starts are as promised.

        The reader checks sums, ranges and alignment of every extent at submit; this is for those
        who build batches, and for what native code cannot see.
        """
        for (name, dtype), array in zip(_DTYPES.items(), self.arrays(), strict=True):
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
                raise UsageError(f"ReadBatch.{name} is not a one-dimensional {dtype.__name__}")
        n, m, c = len(self.length), len(self.iov_length), len(self.check_length)
        lengths = (n, n, n + 1, m, m, n + 1, c, c, c, c)
        for name, array, expected in zip(_DTYPES, self.arrays(), lengths, strict=True):
            if len(array) != expected or not array.flags.c_contiguous:
                raise UsageError(
                    f"ReadBatch.{name} has {len(array)} elements, expected {expected} in a row"
                )
        for name, total in (("iov_start", m), ("check_start", c)):
            starts = getattr(self, name)
            if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
                raise UsageError(f"ReadBatch.{name} does not ascend from 0 to {total}")


_DTYPES = {
    "offset": np.int64,
    "length": np.int64,
    "iov_start": np.int32,
    "iov_address": np.uint64,
    "iov_length": np.int64,
    "check_start": np.int32,
    "check_address": np.uint64,
    "check_length": np.int64,
    "check_seed": np.uint64,
    "check_digest": np.uint64,
}


class Ticket(ABC):
    """One submitted batch."""

    @abstractmethod
    def wait(self, upto: int | None = None) -> None:
        """Return when extents [0, upto) have arrived (all of them when None).

        Raises what the contract says under Failure; ClosedError when they never will arrive
        because the ticket or its storage was closed; UsageError for an `upto` outside the batch.
        """

    @abstractmethod
    def done(self) -> int:
        """How many extents, counted from the first, have arrived; never blocks."""

    @abstractmethod
    def close(self) -> None:
        """Forget what has not begun and wait for what has.  May be called again."""

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Storage(ABC):
    """One open file behind one way of reading it."""

    name: str
    path: str
    size: int  # bytes, when it was opened
    alignment: int  # of offsets and lengths of extents and destinations; 1 when any will do
    memory_alignment: int  # of destination addresses
    engine: str  # who waits for the device: "threads" or "uring"
    submit_ns = 0  # that callers have spent so far on asking for reads natively, waiting apart

    @abstractmethod
    def submit(
        self, batch: ReadBatch, describe: Describe | None = None, *, ahead: bool = False
    ) -> Ticket:
        """Queue all of `batch`.  UsageError when an extent breaks a rule of ReadBatch or the
        alignment; ClosedError after close().  `describe` words places for error messages."""

    def submit_frames(
        self, extents, start: int, stop: int, tables: FrameTables, targets: np.ndarray, *,
        room: int = 0, room_bytes: int = 0, step: int = 0, trash: int,
        describe: Describe | None = None, ahead: bool = False,
    ) -> Ticket:  # fmt: skip
        """`submit` of the extents [start, stop) of `extents` (arrays offset, length, first and
        frames: extent e holds the rows frames[first[e]:first[e + 1]] of `tables`, ascending).

        Each frame goes to its address in `targets` uint64[len(frames)], padded to the tables'
        alignment; what lies between two goes to `trash`.  A target of 0 is filled in here: the
        next place in the `room_bytes` from `room` on, `step` bytes each.  Frame i lies at
        offsets[i]; its check is XXH64, seeded with offsets[i] + file_id, over its stored[i] bytes.
        This is what it means; a backend may do without arrays.
        """
        part = extents.part(start, stop)
        a = int(extents.first[start])
        targets = targets[a : a + len(part.frames)]
        anywhere = np.flatnonzero(targets == 0)
        if len(anywhere) * step > room_bytes:
            raise UsageError(f"no room for all frames: {len(anywhere)} x {step} in {room_bytes}")
        targets[anywhere] = np.arange(len(anywhere), dtype=np.uint64) * np.uint64(
            step
        ) + np.uint64(room)
        batch = ReadBatch.scattered(part, tables, targets, trash)
        return self.submit(batch, describe, ahead=ahead)

    brings = False  # whether `bring`, `submit_runs` and `worded` are there

    def submit_runs(
        self, tables: FrameTables, runs: np.ndarray, first: int, stages: list[RunRead]
    ) -> int:
        """`submit`, ahead, of as many rows of `runs` int64[n, 4], from `first` on, as there are
        `stages`, which none may be in use; their bytes.

        A row is (start, stop, offset, bytes): the frames [start, stop) of `tables` lie one after
        the other at `offset` and go to the stage's address, checked as those of submit_frames.
        """
        raise AssertionError(f"storage {self.name} reads no runs")

    def worded(self, failure: ReadFailure, describe: Describe | None) -> Exception:
        """The error for people that a failure stands for."""
        raise AssertionError(f"storage {self.name} fails otherwise")

    def bring(
        self, request: Request, *, halves: tuple[int, int], half_bytes: int, step: int, trash: int,
        describe: Describe,
    ) -> Bring:  # fmt: skip
        """`submit_frames` of all extents of a request, in waves, as its items are asked for
        natively: see ext/fl_bring.h.  `describe` words places of failures at its start."""
        raise AssertionError(f"storage {self.name} brings nothing")

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, offset + length), of any alignment, up to READ_LIMIT."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Counters since open: bytes_read (asked of the device, repeats included), n_reads,
        n_retries, read_ns (summed over threads)."""

    @classmethod
    def cached_bytes(cls, depth: int, largest_extent: int) -> int:
        """The most of the page cache that reads in flight pass through, `depth` of them at once,
        for a ledger.  Nothing, unless a backend says otherwise."""
        return 0

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor, for looking at the file (fstat, mincore); ClosedError after close()."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what is queued, wait for what is in flight, close the file.  May be repeated."""

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
