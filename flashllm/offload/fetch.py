"""Fetching: extents read, verified and decoded into given memory, in the background.

`FrameSource` is a plane seen as places in the file.  `Fetcher.start` submits all extents of a plan
at once; `Fetch.wait` gives them back in order.  Frames of a `raw` plane are read straight to their
targets.  Coded frames are read to a raw area and decoded from there by worker threads, one decoder
each, as their extents arrive.  Memory belongs to the caller and must stay until `Fetch.close()`.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..cache.arena import Arena
from ..container.base import Plane
from ..errors import CodecError, UnsupportedError
from ..units import KIB, align_up
from .planner import Extents, coalesce

RAW = "raw"
MAX_PIECES = 512  # frames of one extent; with a gap after each, a read scatters over 1024 pieces
# Extents are decoded in groups: waking a thread costs about as much as decoding 50 KiB.
DECODE_GROUP_BYTES = 256 * KIB
_NONE = np.empty(0, dtype=np.uint64)


class FrameSource:
    """Where a plane's frames lie in the file, and how long they are there and decoded."""

    def __init__(self, plane: Plane, alignment: int):
        self.plane, self.name = plane, plane.name
        self.coded = plane.codec != RAW
        self.n_frames, self.per_frame = plane.n_frames, plane.per_frame
        self.n_items, self.frame_bytes = plane.n_items, plane.frame_bytes
        self.alignment = alignment
        self.file_id = np.uint64(plane.file_id)
        self.slot_bytes = slot_bytes(plane, alignment)

    def places(self, frames: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """(file offsets, lengths with padding), int64, of these frames."""
        lengths = self.plane.stored[frames].astype(np.int64)
        lengths += self.alignment - 1
        lengths -= lengths % self.alignment
        return self.plane.offsets[frames].astype(np.int64), lengths

    def extents(self, frames: np.ndarray, *, max_gap: int, max_extent: int) -> Extents:
        offsets, lengths = self.places(frames)
        return coalesce(
            frames, offsets, lengths, max_gap=max_gap, max_extent=max_extent, max_frames=MAX_PIECES
        )

    def run(self, start: int, stop: int) -> Extents:
        """Frames [start, stop), which lie one after the other in the file, as one extent."""
        offset = int(self.plane.offsets[start])
        last = align_up(int(self.plane.stored[stop - 1]), self.alignment)
        length = int(self.plane.offsets[stop - 1]) + last - offset
        return Extents(
            np.arange(start, stop, dtype=np.int32),
            np.array((0, stop - start), dtype=np.int32),
            np.array((offset,), dtype=np.int64),
            np.array((length,), dtype=np.int64),
        )

    def describe(self, frame: int) -> str:
        """'plane layers.3.ffn, frame 17 (items 34 to 35)' for error messages."""
        start = frame * self.per_frame
        stop = min(start + self.per_frame, self.n_items)
        items = f"item {start}" if stop - start == 1 else f"items {start} to {stop - 1}"
        return f"plane {self.name}, frame {frame} ({items})"


def slot_bytes(plane: Plane, alignment: int) -> int:
    """Room for one decoded frame: reads of raw frames end at the file's alignment."""
    return align_up(plane.frame_bytes, alignment if plane.codec == RAW else 64)


def spaced(address: int, step: int, n: int) -> np.ndarray:
    """uint64[n]: `address`, `address + step`, …"""
    return np.uint64(address) + np.arange(n, dtype=np.uint64) * np.uint64(step)


@dataclass(slots=True, eq=False)
class Batch:
    """A batch as the storage contract describes it (see storage.base.ReadBatch)."""

    offset: np.ndarray
    length: np.ndarray
    iov_start: np.ndarray
    iov_address: np.ndarray
    iov_length: np.ndarray
    check_start: np.ndarray
    check_address: np.ndarray
    check_length: np.ndarray
    check_seed: np.ndarray
    check_digest: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.offset, self.length, self.iov_start, self.iov_address, self.iov_length,
            self.check_start, self.check_address, self.check_length, self.check_seed,
            self.check_digest,
        )  # fmt: skip


def linear_places(extents: Extents, source: FrameSource, address: int) -> np.ndarray:
    """uint64 addresses of the frames when the extents lie one after the other from `address`."""
    if len(extents) == 1:  # a stage of the ring, a thousand times per GiB
        shift = np.uint64((address - int(extents.offset[0])) % 2**64)
        return source.plane.offsets[extents.frames] + shift  # wraps back
    starts = np.cumsum(extents.length) - extents.length
    offsets = source.plane.offsets[extents.frames].astype(np.int64)
    shift = np.repeat(starts - extents.offset, np.diff(extents.first))
    return (offsets + shift + address).astype(np.uint64)


def linear_batch(extents: Extents, source: FrameSource, address: int) -> tuple[Batch, np.ndarray]:
    """Each extent in one piece, one after the other; returns the batch and the frames' places."""
    places = linear_places(extents, source, address)
    starts = np.cumsum(extents.length) - extents.length
    return Batch(
        extents.offset,
        extents.length,
        np.arange(len(extents) + 1, dtype=np.int32),
        (starts + address).astype(np.uint64),
        extents.length,
        *_checks(extents, source, places),
    ), places


def scatter_batch(
    extents: Extents, source: FrameSource, targets: np.ndarray, trash: int
) -> Batch:
    """Frames to `targets`, the gaps between them to `trash` (room for the largest gap)."""
    offsets, lengths = source.places(extents.frames)
    m = len(offsets)
    address = np.full(2 * m, trash, dtype=np.uint64)
    length = np.zeros(2 * m, dtype=np.int64)
    address[0::2], length[0::2] = targets, lengths
    length[1:-1:2] = offsets[1:] - offsets[:-1] - lengths[:-1]
    length[2 * extents.first[1:] - 1] = 0  # what follows an extent's last frame is not read
    # A piece that goes on where the one before ended is the same piece (frames in neighbouring
    # slots): an extent into a run of slots is a single piece.
    keep = length > 0
    keep_at = np.flatnonzero(keep)
    starts = np.zeros(2 * m, dtype=bool)
    starts[2 * extents.first[:-1]] = True
    a, n = address[keep_at], length[keep_at]
    head = np.ones(len(keep_at), dtype=bool)
    head[1:] = (a[1:] != a[:-1] + n[:-1].astype(np.uint64)) | starts[keep_at[1:]]
    heads = np.flatnonzero(head)
    iov_start = np.append(np.searchsorted(keep_at[heads], 2 * extents.first[:-1]), len(heads))
    return Batch(
        extents.offset,
        extents.length,
        iov_start.astype(np.int32),
        a[heads],
        np.add.reduceat(n, heads),
        *_checks(extents, source, targets),
    )


def _checks(extents: Extents, source: FrameSource, places: np.ndarray) -> tuple[np.ndarray, ...]:
    plane, frames = source.plane, extents.frames
    if len(extents) == 1 and len(frames) == int(frames[-1]) - int(frames[0]) + 1:
        frames = slice(int(frames[0]), int(frames[-1]) + 1)  # views instead of copies
    return (
        extents.first,
        places,
        plane.stored[frames].astype(np.int64),
        plane.offsets[frames] + source.file_id,  # wraps modulo 2**64, as the format says
        plane.digests[frames],
    )


class _DecodeJob:
    """Extents [start, stop) of a coded fetch: wait for them, decode their frames."""

    __slots__ = ("fetch", "start", "stop", "ready", "error", "ns")

    def __init__(self, fetch: Fetch, start: int, stop: int):
        self.fetch, self.start, self.stop = fetch, start, stop
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.ns = 0


class Fetch:
    """Frames of one plane on their way.  Used by one thread; decoding happens in others.

    Holds a lease of the arena until it is closed; deleting it closes it.
    """

    __slots__ = (
        "source", "extents", "addresses", "failed", "_ticket", "_jobs", "_places", "_cancelled",
        "_closed", "_arena", "_pid",
    )  # fmt: skip

    def __init__(
        self, source: FrameSource, extents: Extents, addresses: np.ndarray, arena: Arena
    ):
        self.source, self.extents, self.addresses = source, extents, addresses
        self.failed = False
        self._ticket = None
        self._jobs: list[_DecodeJob] = []
        self._places: np.ndarray = _NONE
        self._cancelled = self._closed = False
        self._arena, self._pid = arena, os.getpid()
        arena.lease()

    def wait(self, upto: int | None = None) -> None:
        """Return when extents [0, upto) (default: all) can be used.

        Raises FlashReadError, ChecksumError or CodecError naming plane, frame and items; the
        fetch is then failed and is good for nothing but close().
        """
        upto = len(self.extents) if upto is None else upto
        try:
            if not self._jobs:
                self._ticket.wait(upto)
                return
            for job in self._jobs:
                if job.start >= upto:
                    break
                job.ready.wait()
                if job.error is not None:
                    raise job.error
        except Exception:
            self.failed = True
            raise

    def done(self) -> int:
        """How many extents, from the first, can be used now; never blocks."""
        if not self._jobs:
            return self._ticket.done()
        n = 0
        for job in self._jobs:
            if not job.ready.is_set() or job.error is not None:
                break
            n = job.stop
        return n

    @property
    def decode_ns(self) -> int:
        """Thread time spent decoding so far."""
        return sum(job.ns for job in self._jobs)

    def close(self) -> None:
        """Wait until nothing writes to the memory any more; idempotent."""
        if self._closed:
            return
        if os.getpid() != self._pid:  # forked: the threads that would end this stayed behind
            self._closed = True
            return
        self._cancelled = True
        if self._ticket is not None:
            self._ticket.close()
        for job in self._jobs:
            job.ready.wait()
        self._closed = True
        self._arena.release()

    def __del__(self) -> None:
        self.close()

    def _describe(self, extent: int, check: int) -> str:
        """Which frame a failed extent is about; `check` counts within the extent, -1 = none."""
        at = int(self.extents.first[extent]) + max(check, 0)
        return self.source.describe(int(self.extents.frames[at]))


class Fetcher:
    """Starts fetches on one storage; owns the decoding threads (none without coded planes)."""

    def __init__(
        self, storage, arena: Arena, *, path: object, codecs, planes: list[Plane], n_threads: int,
        alignment: int, trash: int,
    ):  # fmt: skip
        for needed in (storage.alignment, getattr(storage, "memory_alignment", 1)):
            if alignment % needed:
                raise UnsupportedError(
                    f"{path}: frames are aligned to {alignment} bytes, the {storage.name!r} "
                    f"backend needs {needed} here"
                )
        self._storage, self._arena, self._path, self._trash = storage, arena, str(path), trash
        names = sorted({plane.codec for plane in planes} - {RAW})
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_decode_forever,
                # One decoder per thread and codec: decoders hold native state.
                args=(self._jobs, {name: codecs[name].decoder() for name in names}, arena,
                      self._path),
                name=f"flashllm-decode-{i}",
                daemon=True,  # a handle that is never closed must not keep the interpreter alive
            )
            for i in range(max(n_threads, 1) if names else 0)
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def start(
        self,
        source: FrameSource,
        extents: Extents,
        *,
        targets: np.ndarray | None = None,
        raw_address: int = 0,
    ) -> Fetch:
        """Submit all extents.

        targets      uint64[m]: where each frame is wanted, decoded.  None: raw frames stay where
                     the extents are read, one after the other from `raw_address`.
        raw_address  for coded planes: room for all extents' bytes
        """
        if source.coded:
            batch, places = linear_batch(extents, source, raw_address)
        elif targets is None:
            batch, targets = linear_batch(extents, source, raw_address)
        else:
            batch = scatter_batch(extents, source, targets, self._trash)
        fetch = Fetch(source, extents, targets, self._arena)
        fetch._ticket = self._storage.submit(batch, fetch._describe)
        if source.coded:
            fetch._places = places
            self._queue_jobs(fetch)
        return fetch

    def _queue_jobs(self, fetch: Fetch) -> None:
        group = np.cumsum(fetch.extents.length) // DECODE_GROUP_BYTES
        ends = [*(np.flatnonzero(np.diff(group)) + 1), len(fetch.extents)]
        start = 0
        for stop in ends:
            fetch._jobs.append(_DecodeJob(fetch, start, int(stop)))
            start = int(stop)
        for job in fetch._jobs:
            self._jobs.put(job)

    def close(self) -> None:
        """Stop the threads; every fetch has been closed before."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _decode_forever(jobs: queue.SimpleQueue, decoders: dict, arena: Arena, path: str) -> None:
    """A decoding thread: jobs in the order in which they were queued, until None."""
    while (job := jobs.get()) is not None:
        try:
            job.fetch._ticket.wait(job.stop)
            if not job.fetch._cancelled:
                start = time.perf_counter_ns()
                _decode(job, decoders[job.fetch.source.plane.codec].decode_into, arena, path)
                job.ns = time.perf_counter_ns() - start
        except BaseException as error:  # handed to the thread that waits, which raises it
            job.error = error
        finally:
            job.ready.set()
        del job  # an idle thread keeps no arrays alive


def _decode(job: _DecodeJob, decode_into: Callable, arena: Arena, path: str) -> None:
    fetch = job.fetch
    source, extents = fetch.source, fetch.extents
    first, last = int(extents.first[job.start]), int(extents.first[job.stop])
    stored = source.plane.stored
    for i in range(first, last):
        frame = int(extents.frames[i])
        coded = arena.view(fetch._places[i], int(stored[frame]))
        out = arena.view(fetch.addresses[i], source.frame_bytes)
        try:
            decode_into(coded.data, out.data)
        except CodecError as error:
            where = f"{source.describe(frame)}: {error.where}"
            raise CodecError(path, where, error.expected, error.found) from error
